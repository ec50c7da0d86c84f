//! By definition: a lane is an output's pixel, counted over the batch, in rows, and its column what each tap sees of each channel.

use std::ops::Range;

use pulp::Simd;

use super::super::memory::Shared;
use super::super::simd::Vectors;
use super::super::skinny::{Columns, Rows, by_item};
use super::{Convolution, TAPS};

pub(super) struct Direct<'a> {
    pub(super) convolution: &'a Convolution<'a>,
    pub(super) y: &'a Shared,
}

/// What column `v` of a kernel sees of an image's line, with zeros around it.
#[inline(always)]
fn see<S: Simd>(simd: S, line: &[f32], stride: usize, v: usize, seen: &mut [f32]) {
    if v == 0 {
        seen[0] = 0.;
    }
    let first = usize::from(v == 0);
    let values = &line[stride * first + v - 1..];
    if stride == 1 {
        let count = values.len().min(seen.len() - first);
        let (within, rest) = seen[first..].split_at_mut(count);
        // SAFETY: as many values.
        unsafe { simd.store_all(within.as_mut_ptr(), &values[..count]) };
        rest.fill(0.);
    } else {
        let at = |c: usize| values.get(stride * c).copied().unwrap_or(0.);
        seen[first..].iter_mut().enumerate().for_each(|(c, seen)| *seen = at(c));
    }
}

// SAFETY: each tap of each channel has its lanes, item by item, and the convolution stays what it is.
unsafe impl Columns<TAPS> for Direct<'_> {
    fn lanes(&self) -> usize {
        self.convolution.batch * self.convolution.rows() * self.convolution.columns()
    }

    #[inline(always)]
    fn lay_out<S: Simd>(&self, simd: S, mut rows: Rows<TAPS>) {
        let c = self.convolution;
        let (width, stride) = (c.columns(), c.stride);
        // What the taps of each column of the kernel see, a line of the image after the other: of stride 2 those at even places, then
        // those at odd ones. The pixels of an item are in a row there for each tap.
        let mut lines = Vec::new();
        for channel in rows.channels.clone() {
            let mut lane = 0;
            for (item, pixels) in by_item(rows.lanes.clone(), c.rows() * width) {
                let image = &c.x[(item * c.inputs + channel) * c.height * c.width..][..c.height * c.width];
                let (top, bottom) = (pixels.start / width, (pixels.end - 1) / width);
                let seen = bottom - top + 3;
                lines.resize(3 * stride * seen * width, 0.);
                for v in 0..3 {
                    for i in 0..stride * (bottom - top) + 3 {
                        let line = &mut lines[((v * stride + i % stride) * seen + i / stride) * width..][..width];
                        match (stride * top + i).checked_sub(1).filter(|source| *source < c.height) {
                            Some(source) => see(simd, &image[source * c.width..][..c.width], stride, v, line),
                            None => line.fill(0.),
                        }
                    }
                }
                for tap in 0..TAPS {
                    let (u, v) = (tap / 3, tap % 3);
                    let first = ((v * stride + u % stride) * seen + u / stride) * width + pixels.start - top * width;
                    let tap = if c.kernel.flipped { TAPS - 1 - tap } else { tap };
                    let row = &mut rows.of(channel, tap)[lane..][..pixels.len()];
                    // SAFETY: as many values.
                    unsafe { simd.store_all(row.as_mut_ptr().cast(), &lines[first..][..pixels.len()]) };
                }
                lane += pixels.len();
            }
        }
    }

    #[inline(always)]
    unsafe fn write<S: Simd>(&self, _: S, outputs: Range<usize>, lanes: Range<usize>, sums: &[f32], stride: usize) {
        let c = self.convolution;
        for (output, sums) in outputs.zip(sums.chunks(stride)) {
            let mut lane = 0;
            for (item, pixels) in by_item(lanes.clone(), c.rows() * c.columns()) {
                let values = &sums[lane..][..pixels.len()];
                // SAFETY: the caller's.
                unsafe { c.write(self.y, (item, output, pixels.start), values) };
                lane += pixels.len();
            }
        }
    }
}
