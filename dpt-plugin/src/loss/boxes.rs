use candle_core::{D, Tensor};

use crate::Result;

/// `[.., 4]` (cx, cy, w, h) to (x0, y0, x1, y1), each `[..]`.
fn corners(boxes: &Tensor) -> Result<[Tensor; 4]> {
    let part = |i| boxes.narrow(D::Minus1, i, 1)?.squeeze(D::Minus1);
    let (cx, cy, w, h) = (part(0)?, part(1)?, (part(2)? * 0.5)?, (part(3)? * 0.5)?);
    Ok([(&cx - &w)?, (&cy - &h)?, (cx + w)?, (cy + h)?])
}

/// Generalised IoU (arXiv 1902.09630): IoU less the share of the hull that neither covers; in (-1, 1].
pub fn generalized_iou(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    let (a, b) = (corners(a)?, corners(b)?);
    let (intersection, union) = overlap(&a, &b)?;
    let hull = area(&[a[0].minimum(&b[0])?, a[1].minimum(&b[1])?, a[2].maximum(&b[2])?, a[3].maximum(&b[3])?])?;
    let iou = (intersection / (&union + EPS)?)?;
    Ok((iou - ((&hull - union)? / (&hull + EPS)?)?)?)
}

/// Keeps the ratio of two empty boxes finite.
const EPS: f64 = 1e-9;

fn overlap(a: &[Tensor; 4], b: &[Tensor; 4]) -> Result<(Tensor, Tensor)> {
    let width = (a[2].minimum(&b[2])? - a[0].maximum(&b[0])?)?.relu()?;
    let height = (a[3].minimum(&b[3])? - a[1].maximum(&b[1])?)?.relu()?;
    let intersection = (width * height)?;
    let union = ((area(a)? + area(b)?)? - &intersection)?;
    Ok((intersection, union))
}

fn area([x0, y0, x1, y1]: &[Tensor; 4]) -> Result<Tensor> {
    Ok(((x1 - x0)? * (y1 - y0)?)?)
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    fn giou(a: [f64; 4], b: [f64; 4]) -> f64 {
        let tensor = |values: [f64; 4]| Tensor::new(&values, &Device::Cpu).unwrap();
        generalized_iou(&tensor(a), &tensor(b)).unwrap().to_scalar().unwrap()
    }

    #[test]
    fn by_hand() {
        let near = |found: f64, expected: f64| assert!((found - expected).abs() < 1e-6, "{found} is not {expected}");
        let square = [0.5, 0.5, 0.2, 0.2];
        near(giou(square, square), 1.);
        // Half of each overlaps: 0.02 of 0.06; their hull is their union.
        near(giou(square, [0.6, 0.5, 0.2, 0.2]), 1. / 3.);
        // Apart by their own width: the hull of three widths is empty by a third.
        near(giou(square, [0.9, 0.5, 0.2, 0.2]), -1. / 3.);
        // One within the other.
        near(giou(square, [0.5, 0.5, 0.1, 0.1]), 0.25);
        // Nothing at all.
        assert!(giou([0.5, 0.5, 0., 0.], [0.5, 0.5, 0., 0.]).is_finite());
    }
}
