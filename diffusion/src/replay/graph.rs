//! Replaying by CUDA graphs.

use std::fmt::Display;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use candle_core::cuda::CudaDevice;
use candle_core::cuda::cudarc::driver::sys::{CUgraphInstantiate_flags, CUstreamCaptureMode};
use candle_core::cuda::cudarc::driver::{CudaGraph, CudaStream};
use candle_core::{Device, Tensor};

use super::{Pass, askers};
use crate::device::{release_graphs, release_pool};
use crate::{Error, Result};

/// How often a graph is tried to be made: what another thread asks of the driver may spoil a capture.
const ATTEMPTS: usize = 2;

/// Graphs that there are, of all devices.
static LIVE: AtomicUsize = AtomicUsize::new(0);

pub(super) type Work<'a, E> = dyn FnMut(&[&Tensor], Pass) -> std::result::Result<Vec<Tensor>, E> + 'a;

/// What there is of a graph.
#[derive(Default)]
pub(super) enum State {
    #[default]
    Fresh,
    /// Work was done once: kernels are loaded, and where its numbers come and go is known.
    Known {
        places: Places,
        failures: usize,
    },
    Captured(Captured),
    /// No graph could be made.
    Refused,
}

/// Tensors that a graph reads its inputs from and leaves its results in. They are not of the graph's own memory.
#[derive(Clone)]
pub(super) struct Places {
    inputs: Vec<Tensor>,
    outputs: Vec<Tensor>,
}

/// A stream that is being captured, until this is dropped.
struct Capture {
    stream: Arc<CudaStream>,
    ended: bool,
}

impl Capture {
    fn begin(device: &CudaDevice) -> Result<Self> {
        let stream = device.cuda_stream();
        // Other threads, the host's among them, may allocate and load meanwhile.
        let mode = CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        stream.begin_capture(mode).map_err(candle_core::Error::wrap)?;
        Ok(Self { stream, ended: false })
    }

    fn end(mut self) -> Result<CudaGraph> {
        // What failed as memory was given back would be reported by whatever is asked next.
        let given_back = self.stream.context().check_err();
        let graph = self.stream.end_capture(CUgraphInstantiate_flags(0)).map_err(candle_core::Error::wrap)?;
        self.ended = true;
        given_back.map_err(candle_core::Error::wrap)?;
        graph.ok_or_else(|| Error::Unsupported("the driver captured nothing".into()))
    }
}

impl Drop for Capture {
    fn drop(&mut self) {
        if !self.ended {
            let _ = self.stream.context().check_err();
            drop(self.stream.end_capture(CUgraphInstantiate_flags(0)));
        }
    }
}

/// A graph that can be launched, and its places.
pub(super) struct Captured {
    /// Until this is dropped.
    graph: Option<CudaGraph>,
    places: Places,
    ordinal: usize,
}

// SAFETY: a graph may be used by any thread, by one at a time, and whoever uses this has it for itself.
unsafe impl Send for Captured {}

/// The one device of all inputs, if it is CUDA's and allocates in the order of streams, which graphs need.
pub(super) fn device_of(inputs: &[&Tensor]) -> Option<CudaDevice> {
    let Device::Cuda(device) = inputs.first()?.device() else { return None };
    let same = inputs.iter().all(|input| input.device().same_device(inputs[0].device()));
    (same && device.cuda_stream().context().has_async_alloc()).then(|| device.clone())
}

impl State {
    pub(super) fn run<E: From<Error> + Display>(
        &mut self,
        device: &CudaDevice,
        inputs: &[&Tensor],
        work: &mut Work<'_, E>,
        outcome: &mut Option<Result<()>>,
    ) -> std::result::Result<Vec<Tensor>, E> {
        if matches!(self, Self::Refused) {
            return work(inputs, Pass::Now);
        }
        if !self.fits(inputs) {
            *self = Self::Fresh;
        }
        if let Self::Captured(captured) = self {
            match captured.launch(inputs) {
                Ok(results) => return Ok(results),
                Err(error) => {
                    *self = Self::Refused;
                    *outcome = Some(Err(error));
                    return work(inputs, Pass::Now);
                }
            }
        }
        if let Self::Known { places, failures } = self {
            match askers::alone(|| Captured::new(device, places, inputs, work)) {
                None => {}
                Some(Ok((captured, results))) => {
                    *self = Self::Captured(captured);
                    *outcome = Some(Ok(()));
                    return Ok(results);
                }
                Some(Err(error)) => {
                    *failures += 1;
                    if *failures == ATTEMPTS {
                        *self = Self::Refused;
                        *outcome = Some(Err(error));
                    }
                }
            }
        }
        let _uploads = device.enable_cuda_graph_htod_cache();
        let results = work(inputs, Pass::Now)?;
        if matches!(self, Self::Fresh) {
            *self = match Places::new(inputs, &results) {
                Ok(places) => Self::Known { places, failures: 0 },
                Err(error) => {
                    *outcome = Some(Err(error));
                    Self::Refused
                }
            };
        }
        Ok(results)
    }

    fn fits(&self, inputs: &[&Tensor]) -> bool {
        match self {
            Self::Known { places, .. } | Self::Captured(Captured { places, .. }) => places.fit(inputs),
            Self::Fresh | Self::Refused => true,
        }
    }
}

impl Places {
    fn new(inputs: &[&Tensor], results: &[Tensor]) -> Result<Self> {
        let like = |tensor: &Tensor| {
            let place = Tensor::zeros(tensor.shape(), tensor.dtype(), tensor.device())?;
            // What it takes is loaded then: nothing can be while a stream is captured.
            put(tensor, &place)?;
            Ok(place)
        };
        let inputs = inputs.iter().map(|input| like(input)).collect::<Result<_>>()?;
        Ok(Self { inputs, outputs: results.iter().map(like).collect::<Result<_>>()? })
    }

    /// Does the work from place to place, all of whose other tensors are freed then.
    fn receive<E: Display>(&self, work: &mut Work<'_, E>) -> Result<()> {
        let inputs: Vec<&Tensor> = self.inputs.iter().collect();
        let results = work(&inputs, Pass::Captured).map_err(|error| Error::Unsupported(error.to_string()))?;
        assert_eq!(results.len(), self.outputs.len(), "results of the same work");
        results.iter().zip(&self.outputs).try_for_each(|(result, place)| put(result, place))
    }

    fn fit(&self, inputs: &[&Tensor]) -> bool {
        let same = |(place, input): (&Tensor, &&Tensor)| {
            place.shape() == input.shape()
                && place.dtype() == input.dtype()
                && place.device().same_device(input.device())
        };
        self.inputs.len() == inputs.len() && self.inputs.iter().zip(inputs).all(same)
    }
}

impl Captured {
    /// Captures the work and launches it for the first time.
    fn new<E: Display>(
        device: &CudaDevice,
        places: &Places,
        inputs: &[&Tensor],
        work: &mut Work<'_, E>,
    ) -> Result<(Self, Vec<Tensor>)> {
        // What candle uploaded before comes from memory of the device, and it refuses to upload anything else.
        let _uploads = device.enable_cuda_graph_htod_cache();
        // What the work took as it was is not taken again, and the graph needs as much.
        release_pool(device)?;
        let capture = Capture::begin(device)?;
        let done = places.receive(work);
        let graph = capture.end();
        done?;
        let (graph, ordinal) = (Some(graph?), device.cuda_stream().context().ordinal());
        LIVE.fetch_add(1, Ordering::Relaxed);
        let captured = Self { graph, places: places.clone(), ordinal };
        let results = captured.launch(inputs)?;
        Ok((captured, results))
    }

    /// Results are copies: the next launch writes over the places.
    fn launch(&self, inputs: &[&Tensor]) -> Result<Vec<Tensor>> {
        for (place, input) in self.places.inputs.iter().zip(inputs) {
            put(input, place)?;
        }
        let graph = self.graph.as_ref().expect("until it is dropped");
        graph.launch().map_err(candle_core::Error::wrap)?;
        self.places.outputs.iter().map(|output| Ok(output.copy()?)).collect()
    }
}

impl Drop for Captured {
    fn drop(&mut self) {
        self.graph = None;
        // The graphs of a device share their memory, and those that are left would have to ask for it again.
        if LIVE.fetch_sub(1, Ordering::Relaxed) == 1 {
            release_graphs(self.ordinal);
        }
    }
}

/// Writes a tensor to a place of its shape and dtype.
fn put(tensor: &Tensor, place: &Tensor) -> Result<()> {
    let flat = |tensor: &Tensor| tensor.contiguous()?.flatten_all();
    Ok(flat(place)?.slice_set(&flat(tensor)?, 0, 0)?)
}
