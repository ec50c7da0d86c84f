//! A host's CUDA memory and streams, by the driver alone: what the plugin is lent in these tests.

use std::ffi::c_void;
use std::sync::Arc;

use candle_core::cuda::cudarc::driver::{CudaContext, result, sys};
use half::{bf16, f16};
use host_api::{Dtype, Element, Memory, View, ViewMut};

/// The device of these tests, its primary context current.
pub fn context() -> Arc<CudaContext> {
    context_of(0)
}

/// The same of another.
pub fn context_of(ordinal: usize) -> Arc<CudaContext> {
    assert_eq!(tests::device_name(), "cuda", "TEST_DEVICE");
    let context = CudaContext::new(ordinal).unwrap();
    context.bind_to_thread().unwrap();
    context
}

/// The streams that a host may name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// NULL.
    Null,
    /// `cudaStreamLegacy`.
    Legacy,
    /// `cudaStreamPerThread`.
    PerThread,
    /// One that waits for the legacy stream.
    Blocking,
    /// One that does not.
    NonBlocking,
}

pub const KINDS: [Kind; 5] = [Kind::Null, Kind::Legacy, Kind::PerThread, Kind::Blocking, Kind::NonBlocking];

pub struct Stream {
    pub handle: sys::CUstream,
    own: bool,
    ordinal: usize,
}

impl Stream {
    pub fn new(kind: Kind) -> Self {
        Self::on(0, kind)
    }

    pub fn on(ordinal: usize, kind: Kind) -> Self {
        context_of(ordinal);
        let own = |kind| Self { handle: result::stream::create(kind).unwrap(), own: true, ordinal };
        match kind {
            Kind::Null => Self { handle: std::ptr::null_mut(), own: false, ordinal },
            Kind::Legacy => Self { handle: std::ptr::without_provenance_mut(1), own: false, ordinal },
            Kind::PerThread => Self { handle: std::ptr::without_provenance_mut(2), own: false, ordinal },
            Kind::Blocking => own(result::stream::StreamKind::Default),
            Kind::NonBlocking => own(result::stream::StreamKind::NonBlocking),
        }
    }

    /// Where views on this stream are.
    pub fn memory(&self) -> Memory {
        Memory::Cuda { ordinal: self.ordinal, stream: self.handle.cast() }
    }

    pub fn wait(&self) {
        // SAFETY: a stream of the current context.
        unsafe { result::stream::synchronize(self.handle) }.unwrap();
    }

    /// Whether work is left on it.
    pub fn is_busy(&self) -> bool {
        // SAFETY: as above.
        match unsafe { sys::cuStreamQuery(self.handle) } {
            sys::CUresult::CUDA_SUCCESS => false,
            sys::CUresult::CUDA_ERROR_NOT_READY => true,
            other => panic!("{other:?}"),
        }
    }

    /// Copies on the stream.
    pub fn copy(&self, from: &Buffer, to: &Buffer) {
        let bytes = from.bytes.min(to.bytes);
        // SAFETY: both are alive and at least as long; the tests wait for the stream before they drop them.
        unsafe { result::memcpy_dtod_async(to.pointer, from.pointer, bytes, self.handle) }.unwrap();
    }

    /// Keeps the stream busy for about a tenth of a second, by copies within `room`.
    pub fn delay(&self, room: &Buffer) {
        let half = room.bytes / 2;
        for _ in 0..200 {
            // SAFETY: two halves of one buffer.
            unsafe { result::memcpy_dtod_async(room.pointer + half as u64, room.pointer, half, self.handle) }.unwrap();
        }
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        self.wait();
        if self.own {
            // SAFETY: made by `new`, and idle.
            unsafe { result::stream::destroy(self.handle) }.unwrap();
        }
    }
}

/// Memory of the host's own on the device.
pub struct Buffer {
    pub pointer: sys::CUdeviceptr,
    pub bytes: usize,
    ordinal: usize,
}

impl Buffer {
    pub fn new(bytes: usize) -> Self {
        Self::on(0, bytes)
    }

    pub fn on(ordinal: usize, bytes: usize) -> Self {
        context_of(ordinal);
        // SAFETY: written by those who read it.
        Self { pointer: unsafe { result::malloc_sync(bytes) }.unwrap(), bytes, ordinal }
    }

    /// With these numbers, rounded to the type.
    pub fn of(values: &[f32], dtype: Dtype) -> Self {
        Self::raw(&encode(values, dtype))
    }

    pub fn raw(bytes: &[u8]) -> Self {
        Self::raw_on(0, bytes)
    }

    pub fn raw_on(ordinal: usize, bytes: &[u8]) -> Self {
        let buffer = Self::on(ordinal, bytes.len());
        // SAFETY: as long as the bytes.
        unsafe { result::memcpy_htod_sync(buffer.pointer, bytes) }.unwrap();
        buffer
    }

    /// What it holds when all work on the device is done.
    pub fn bytes(&self) -> Vec<u8> {
        context_of(self.ordinal).synchronize().unwrap();
        let mut bytes = vec![0; self.bytes];
        // SAFETY: as long as the bytes.
        unsafe { result::memcpy_dtoh_sync(&mut bytes, self.pointer) }.unwrap();
        bytes
    }

    pub fn numbers(&self, dtype: Dtype) -> Vec<f32> {
        decode(&self.bytes(), dtype)
    }

    pub fn address(&self) -> *mut c_void {
        std::ptr::with_exposed_provenance_mut(self.pointer as usize)
    }

    pub fn view(&self, dtype: Dtype, shape: &[usize], on: &Stream) -> View<'_> {
        self.strided(dtype, shape, None, 0, on)
    }

    /// `offset` in elements.
    pub fn strided(
        &self,
        dtype: Dtype,
        shape: &[usize],
        strides: Option<&[i64]>,
        offset: usize,
        on: &Stream,
    ) -> View<'_> {
        let first = self.address().wrapping_byte_add(offset * dtype.size());
        // SAFETY: the tests name layouts within the buffer.
        unsafe { View::of_memory(first, dtype, shape, strides, on.memory()) }.unwrap()
    }

    pub fn view_mut(&self, dtype: Dtype, shape: &[usize], on: &Stream) -> ViewMut<'_> {
        self.strided_mut(dtype, shape, None, 0, on)
    }

    pub fn strided_mut(
        &self,
        dtype: Dtype,
        shape: &[usize],
        strides: Option<&[i64]>,
        offset: usize,
        on: &Stream,
    ) -> ViewMut<'_> {
        let first = self.address().wrapping_byte_add(offset * dtype.size());
        // SAFETY: as above; the buffer is touched by nothing but views meanwhile.
        unsafe { ViewMut::of_memory(first, dtype, shape, strides, on.memory()) }.unwrap()
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        context_of(self.ordinal);
        // SAFETY: made by `on`; freeing waits for the device.
        unsafe { result::free_sync(self.pointer) }.unwrap();
    }
}

pub fn encode(values: &[f32], dtype: Dtype) -> Vec<u8> {
    let bytes = |value: &f32| match dtype {
        Dtype::F32 => value.to_le_bytes().to_vec(),
        Dtype::F16 => f16::from_f32(*value).to_le_bytes().to_vec(),
        Dtype::Bf16 => bf16::from_f32(*value).to_le_bytes().to_vec(),
    };
    values.iter().flat_map(bytes).collect()
}

pub fn decode(bytes: &[u8], dtype: Dtype) -> Vec<f32> {
    let number = |bytes: &[u8]| match dtype {
        Dtype::F32 => f32::from_le_bytes(bytes.try_into().unwrap()),
        Dtype::F16 => f16::from_le_bytes(bytes.try_into().unwrap()).to_f32(),
        Dtype::Bf16 => bf16::from_le_bytes(bytes.try_into().unwrap()).to_f32(),
    };
    bytes.chunks(dtype.size()).map(number).collect()
}

/// The same numbers in main memory, as `f` takes them.
pub fn in_main_memory<T>(
    values: &[f32],
    dtype: Dtype,
    shape: &[usize],
    f: impl FnOnce(&mut ViewMut<'_>) -> T,
) -> (T, Vec<f32>) {
    fn typed<E: Element, T>(values: &[f32], shape: &[usize], f: impl FnOnce(&mut ViewMut<'_>) -> T) -> (T, Vec<f32>) {
        let mut typed: Vec<E> = values.iter().map(|value| E::from_f32(*value)).collect();
        let result = f(&mut ViewMut::new(&mut typed, shape).unwrap());
        (result, typed.into_iter().map(E::to_f32).collect())
    }
    match dtype {
        Dtype::F32 => typed::<f32, T>(values, shape, f),
        Dtype::F16 => typed::<f16, T>(values, shape, f),
        Dtype::Bf16 => typed::<bf16, T>(values, shape, f),
    }
}
