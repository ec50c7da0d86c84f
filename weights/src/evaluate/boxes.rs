use crate::Found;

/// Intersection over union of two boxes (cx, cy, w, h).
pub fn box_iou(a: [f32; 4], b: [f32; 4]) -> f64 {
    let edges = |[cx, cy, w, h]: [f32; 4]| [cx - w / 2., cy - h / 2., cx + w / 2., cy + h / 2.].map(f64::from);
    let (a, b) = (edges(a), edges(b));
    let overlap = |low: usize| (a[low + 2].min(b[low + 2]) - a[low].max(b[low])).max(0.);
    let area = |e: [f64; 4]| (e[2] - e[0]) * (e[3] - e[1]);
    let intersection = overlap(0) * overlap(1);
    let union = area(a) + area(b) - intersection;
    if union > 0. { intersection / union } else { 0. }
}

/// The box of several draws that agrees best with all: the largest sum of overlaps, each weighted by the other's probability.
/// There is at least one.
pub fn agreed(found: &[Found]) -> Found {
    let support = |one: &Found| {
        let overlap = |other: &Found| f64::from(other.probability) * box_iou(one.bounding_box, other.bounding_box);
        found.iter().map(overlap).sum::<f64>()
    };
    *found.iter().max_by(|a, b| support(a).total_cmp(&support(b))).expect("at least one box")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_outlier_is_outvoted() {
        let found = |x: f32, probability: f32| Found { bounding_box: [x, 0.5, 0.2, 0.2], probability };
        let boxes = [found(0.9, 0.99), found(0.30, 0.6), found(0.31, 0.6), found(0.32, 0.6)];
        assert_eq!(agreed(&boxes), boxes[2]);
        assert_eq!(agreed(&boxes[..1]), boxes[0]);
    }

    #[test]
    fn overlap_by_hand() {
        let square = [0.5, 0.5, 0.2, 0.2];
        assert!((box_iou(square, square) - 1.).abs() < 1e-6);
        assert!((box_iou(square, [0.6, 0.5, 0.2, 0.2]) - 1. / 3.).abs() < 1e-6);
        assert_eq!(box_iou(square, [0.1, 0.1, 0.1, 0.1]), 0.);
        assert_eq!(box_iou([0.5, 0.5, 0., 0.], [0.5, 0.5, 0., 0.]), 0.);
    }
}
