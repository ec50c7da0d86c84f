/// Eq. 9, `z_t <- z_t + eta ds/dz_t`: what is added to one item's latents. With a `bound`, the correction is shortened to at
/// most `bound` times the latents' norm. All in variance-preserving space.
pub fn correction(latents: &[f32], gradient: &[f32], eta: f64, bound: Option<f64>) -> Vec<f32> {
    let size = eta.abs() * norm(gradient);
    let limit = bound.map_or(f64::INFINITY, |bound| bound * norm(latents));
    let eta = if size > limit { eta * (limit / size) } else { eta };
    gradient.iter().map(|g| (eta * f64::from(*g)) as f32).collect()
}

/// L2 norm, summed in f64.
pub fn norm(values: &[f32]) -> f64 {
    values.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>().sqrt()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_gradient_is_scaled_by_eta() {
        assert_eq!(correction(&[1., 2.], &[3., -4.], 0.5, None), [1.5, -2.]);
        assert_eq!(correction(&[1., 2.], &[3., -4.], -0.5, None), [-1.5, 2.]);
    }

    #[test]
    fn a_bound_shortens_but_never_turns_or_lengthens() {
        // |z| = 5, |eta g| = 10: bound 0.1 leaves 0.5 of it.
        assert_eq!(correction(&[3., 4.], &[6., 8.], 1., Some(0.1)), [0.3, 0.4]);
        assert_eq!(correction(&[3., 4.], &[6., 8.], -1., Some(0.1)), [-0.3, -0.4]);
        assert_eq!(correction(&[3., 4.], &[0.3, 0.4], 1., Some(0.5)), [0.3, 0.4]);
        assert_eq!(correction(&[0., 0.], &[0.3, 0.4], 1., Some(0.5)), [0., 0.]);
        assert_eq!(correction(&[3., 4.], &[0., 0.], 1., Some(0.5)), [0., 0.]);
    }
}
