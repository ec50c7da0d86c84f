//! Copies in the order of streams. On a device, the one that is written to copies: it waits for what the other stream holds, and
//! the other waits for the copy. Thus what was to be read is ready, and may be overwritten or freed in either stream's order.

use std::ffi::c_void;
use std::sync::Arc;

use candle_core::CudaDevice;
use candle_core::cuda::cudarc::driver::{CudaSlice, CudaStream, DevicePtr, result, sys};
use host_api::{Error, Memory, Result, Status, View, ViewMut};

use super::strided::{self, Strided};
use super::{driver, open};

/// The handle by which the legacy default stream is named besides NULL.
const LEGACY: usize = 1;

pub(super) fn copy(from: &View<'_>, to: &mut ViewMut<'_>) -> Result<()> {
    assert_eq!((from.shape(), from.dtype()), (to.shape(), to.dtype()), "views of one shape and dtype");
    let _asking = diffusion::asking();
    match (from.memory(), to.memory()) {
        _ if from.is_empty() => Ok(()),
        (Memory::Main, Memory::Main) => {
            to.copy_from(from);
            Ok(())
        }
        (Memory::Main, Memory::Cuda { ordinal, stream }) => upload(from, to, &Place::new(ordinal, stream)?),
        (Memory::Cuda { ordinal, stream }, Memory::Main) => download(from, to, &Place::new(ordinal, stream)?),
        (Memory::Cuda { ordinal: a, stream: source }, Memory::Cuda { ordinal: b, stream: target }) => {
            if a != b {
                let message = format!("from cuda:{a} to cuda:{b}: nothing is copied between devices");
                return Err(Error::new(Status::Unsupported, message));
            }
            let (source, target) = (Place::new(a, source)?, Place::new(b, target)?);
            on_device(from, to, &source.stream, &target)
        }
    }
}

/// A device and a stream on it.
struct Place {
    device: CudaDevice,
    stream: Arc<CudaStream>,
}

impl Place {
    /// Makes the device's context current.
    fn new(ordinal: usize, stream: *mut c_void) -> Result<Self> {
        let device = open(ordinal)?;
        let context = device.cuda_stream().context().clone();
        context.bind_to_thread().map_err(driver)?;
        let stream = if stream.addr() == LEGACY { std::ptr::null_mut() } else { stream };
        // SAFETY: a stream of the device's primary context by the promise of who made the view; it is not kept.
        let stream = unsafe { context.wrap_borrowed_stream(stream.cast()) };
        Ok(Self { device, stream })
    }

    /// Copies between memory of the device in the stream's order.
    ///
    /// # Safety
    /// Both layouts lie in memory of the device.
    unsafe fn transfer(&self, size: usize, shape: &[usize], from: Packed<'_>, to: Packed<'_>) -> Result<()> {
        match (from.strides, to.strides) {
            (None, None) => {
                let bytes = shape.iter().product::<usize>() * size;
                // SAFETY: the caller's promise.
                unsafe { result::memcpy_dtod_async(to.first, from.first, bytes, self.stream.cu_stream()) }
                    .map_err(driver)
            }
            (a, b) => {
                let (a, b) = (
                    a.map_or_else(|| row_major(shape), <[i64]>::to_vec),
                    b.map_or_else(|| row_major(shape), <[i64]>::to_vec),
                );
                let copy = Strided { size, shape, from: (from.first, &a), to: (to.first, &b) };
                // SAFETY: the caller's promise.
                unsafe { strided::copy(&self.device, &self.stream, &copy) }
            }
        }
    }

    /// Memory for as many bytes, in the stream's order.
    fn room(&self, bytes: usize) -> Result<CudaSlice<u8>> {
        // SAFETY: it is written before it is read.
        unsafe { self.stream.alloc::<u8>(bytes) }.map_err(driver)
    }

    /// Waits for the stream, whatever came of putting work on it, so that no one's main memory is used any more.
    fn wait(&self, enqueued: Result<()>) -> Result<()> {
        let waited = self.stream.synchronize().map_err(driver);
        enqueued.and(waited)
    }
}

/// Elements on the device; without gaps and in row-major order when there are no strides.
#[derive(Clone, Copy)]
struct Packed<'a> {
    first: sys::CUdeviceptr,
    strides: Option<&'a [i64]>,
}

impl<'a> Packed<'a> {
    fn of(view: &'a View<'_>) -> Self {
        let strides = (!view.is_contiguous()).then(|| view.strides());
        Self { first: view.as_ptr().addr() as u64, strides }
    }

    fn room(slice: &CudaSlice<u8>, stream: &CudaStream) -> Packed<'static> {
        Packed { first: slice.device_ptr(stream).0, strides: None }
    }
}

fn row_major(shape: &[usize]) -> Vec<i64> {
    let mut strides = vec![1; shape.len()];
    for axis in (1..shape.len()).rev() {
        strides[axis - 1] = strides[axis] * shape[axis] as i64;
    }
    strides
}

fn on_device(from: &View<'_>, to: &mut ViewMut<'_>, source: &CudaStream, target: &Place) -> Result<()> {
    let joined = *source != *target.stream;
    if joined {
        target.stream.join(source).map_err(driver)?;
    }
    let to = to.as_view();
    // SAFETY: the views' promise.
    let copied = unsafe { target.transfer(from.dtype().size(), from.shape(), Packed::of(from), Packed::of(&to)) };
    if joined {
        source.join(&target.stream).map_err(driver)?;
    }
    copied
}

fn upload(from: &View<'_>, to: &mut ViewMut<'_>, target: &Place) -> Result<()> {
    let (size, shape) = (from.dtype().size(), from.shape());
    let bytes = from.len() * size;
    let mut staged = Staging::new(if from.is_contiguous() { 0 } else { bytes });
    let start = if from.is_contiguous() {
        from.as_ptr()
    } else {
        let mut packed = staged.view(from)?;
        packed.copy_from(from);
        packed.as_mut_ptr().cast_const()
    };
    let to = to.as_view();
    let place = Packed::of(&to);
    let stream = &target.stream;
    let enqueue = || {
        let room = place.strides.map(|_| target.room(bytes)).transpose()?;
        let landing = room.as_ref().map_or(place, |room| Packed::room(room, stream));
        // SAFETY: as many bytes on both sides; those in main memory live until the stream has been waited for.
        unsafe { sys::cuMemcpyHtoDAsync_v2(landing.first, start, bytes, stream.cu_stream()) }
            .result()
            .map_err(driver)?;
        // SAFETY: the view's promise, and the room has as many elements.
        room.map_or(Ok(()), |_room| unsafe { target.transfer(size, shape, landing, place) })
    };
    target.wait(enqueue())
}

fn download(from: &View<'_>, to: &mut ViewMut<'_>, source: &Place) -> Result<()> {
    let (size, shape) = (from.dtype().size(), from.shape());
    let bytes = from.len() * size;
    let mut staged = Staging::new(if to.is_contiguous() { 0 } else { bytes });
    let start = if to.is_contiguous() { to.as_mut_ptr() } else { staged.start() };
    let place = Packed::of(from);
    let stream = &source.stream;
    let enqueue = || {
        let room = place.strides.map(|_| source.room(bytes)).transpose()?;
        let packed = room.as_ref().map_or(place, |room| Packed::room(room, stream));
        if room.is_some() {
            // SAFETY: the view's promise, and the room has as many elements.
            unsafe { source.transfer(size, shape, place, packed) }?;
        }
        // SAFETY: as many bytes on both sides; those in main memory live until the stream has been waited for.
        unsafe { sys::cuMemcpyDtoHAsync_v2(start, packed.first, bytes, stream.cu_stream()) }.result().map_err(driver)
    };
    source.wait(enqueue())?;
    if !to.is_contiguous() {
        to.copy_from(&staged.view(from)?.as_view());
    }
    Ok(())
}

/// Main memory for a view without gaps, aligned for every dtype.
struct Staging(Vec<u32>);

impl Staging {
    fn new(bytes: usize) -> Self {
        Self(vec![0; bytes.div_ceil(4)])
    }

    fn start(&mut self) -> *mut c_void {
        self.0.as_mut_ptr().cast()
    }

    /// As a view of `like`'s shape and dtype.
    fn view(&mut self, like: &View<'_>) -> Result<ViewMut<'_>> {
        assert!(self.0.len() * 4 >= like.len() * like.dtype().size());
        // SAFETY: enough aligned and initialized memory, borrowed for the view.
        unsafe { ViewMut::of_memory(self.start(), like.dtype(), like.shape(), None, Memory::Main) }
    }
}
