use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use candle_core::{DType, Device, Tensor};

use crate::Result;

/// Those of each size that was asked for. None is ever let go: a recorded step may read it.
#[derive(Default)]
pub(super) struct SinePositions(Mutex<HashMap<(usize, usize), Tensor>>);

impl SinePositions {
    /// [`sine`] of an adapter's `d`, dtype and device.
    pub(super) fn of(&self, height: usize, width: usize, d: usize, dtype: DType, device: &Device) -> Result<Tensor> {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(positions) = known.get(&(height, width)) {
            return Ok(positions.clone());
        }
        let positions = sine(height, width, d, device)?.to_dtype(dtype)?;
        known.insert((height, width), positions.clone());
        Ok(positions)
    }
}

/// While a step may be captured, candle keeps what is uploaded of so many numbers or fewer, and frees it as the thread ends: when that
/// device may be another thread's.
const KEPT: usize = 1024;

/// DETR's normalised 2-D sine embedding with temperature 10000, `[1, h * w, d]`: the first half of the channels encodes y,
/// the second x. `d` is divisible by 4.
fn sine(height: usize, width: usize, d: usize, device: &Device) -> Result<Tensor> {
    let half = d / 2;
    let wave = |index: usize, size: usize| {
        let position = (index + 1) as f32 / (size as f32 + 1e-6) * std::f32::consts::TAU;
        (0..half).map(move |i| {
            let angle = position / 10_000f32.powf((2 * (i / 2)) as f32 / half as f32);
            if i % 2 == 0 { angle.sin() } else { angle.cos() }
        })
    };
    let waves = |size: usize| -> Vec<f32> { (0..size).flat_map(|index| wave(index, size)).collect() };
    let (rows, columns) = (waves(height), waves(width));
    let mut values: Vec<f32> = Vec::with_capacity(height * width * d);
    for row in rows.chunks_exact(half) {
        for column in columns.chunks_exact(half) {
            values.extend(row.iter().chain(column));
        }
    }
    let count = values.len();
    values.resize(count.max(KEPT + 1), 0.);
    Ok(Tensor::new(values, device)?.narrow(0, 0, count)?.reshape((1, height * width, d))?)
}
