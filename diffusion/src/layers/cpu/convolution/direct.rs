//! By definition: a lane is an output's pixel, counted over the batch, in rows; an element is the pixel that a tap sees. All nine
//! add to one sum.

use std::mem::MaybeUninit;

use pulp::Simd;

use super::method::{Input, Method, Output, place};
use super::{Convolution, TAPS};

pub(super) struct Direct;

impl Method for Direct {
    const ELEMENTS: usize = TAPS;
    const SUMS: usize = 1;
    const PANELS: usize = 8;

    fn lanes(c: &Convolution) -> usize {
        c.batch * c.rows() * c.columns()
    }

    #[inline(always)]
    fn take_input<S: Simd>(_: S, input: Input) {
        let Input { convolution: c, panels, lanes: pixels, channel, v, scratch } = input;
        // A line of the image with zeros around it.
        scratch.clear();
        scratch.resize(c.width + 2, 0.);
        let mut pixel = pixels.start;
        while pixel < pixels.end {
            let (item, row, column) = place(pixel, c.rows(), c.columns());
            let count = (c.columns() - column).min(pixels.end - pixel);
            let image = &c.x[(item * c.inputs + channel) * c.height * c.width..][..c.height * c.width];
            for u in 0..3 {
                let source = (c.stride * row + u).checked_sub(1).filter(|source| *source < c.height);
                match source {
                    None => scratch.fill(0.),
                    Some(source) => scratch[1..1 + c.width].copy_from_slice(&image[source * c.width..][..c.width]),
                }
                for tap in 3 * u..3 * u + 3 {
                    let seen = &scratch[tap % 3 + c.stride * column..];
                    let mut done = 0;
                    while done < count {
                        let lane = pixel - pixels.start + done;
                        let run = (panels.width - lane % panels.width).min(count - done);
                        let at = v.at(panels.at(lane / panels.width, tap, channel) + lane % panels.width);
                        // SAFETY: lanes of this channel, which is this task's.
                        let lanes = unsafe { std::slice::from_raw_parts_mut(at.cast::<MaybeUninit<f32>>(), run) };
                        let values = seen[c.stride * done..].iter().step_by(c.stride);
                        lanes.iter_mut().zip(values).for_each(|(lane, value)| _ = lane.write(*value));
                        done += run;
                    }
                }
            }
            pixel += count;
        }
    }

    #[inline(always)]
    fn kernel<'a, S: Simd>(_: S, taps: &'a [f32], _: &'a mut Vec<f32>, _: usize) -> &'a [f32] {
        taps
    }

    #[inline(always)]
    unsafe fn write<S: Simd>(_: S, output: Output) {
        let (c, pixels) = (output.convolution, output.lanes.clone());
        let mut pixel = pixels.start;
        while pixel < pixels.end {
            let at = place(pixel, c.rows(), c.columns());
            let count = (c.columns() - at.2).min(pixels.end - pixel);
            // SAFETY: the caller's.
            unsafe { output.write_row(at, &output.sums[pixel - pixels.start..][..count]) };
            pixel += count;
        }
    }
}
