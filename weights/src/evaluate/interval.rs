/// Wilson's interval for a share of `hits` in `trials`, at 95 %.
pub fn wilson(hits: usize, trials: usize) -> (f64, f64) {
    const Z: f64 = 1.959_964;
    if trials == 0 {
        return (0., 1.);
    }
    let (n, p) = (trials as f64, hits as f64 / trials as f64);
    let middle = p + Z * Z / (2. * n);
    let spread = Z * (p * (1. - p) / n + Z * Z / (4. * n * n)).sqrt();
    let scale = 1. + Z * Z / n;
    ((middle - spread) / scale, (middle + spread) / scale)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// statsmodels.stats.proportion.proportion_confint(7, 20, method="wilson").
    #[test]
    fn as_in_statsmodels() {
        let (low, high) = wilson(7, 20);
        assert!((low - 0.181_192).abs() < 1e-5 && (high - 0.567_148).abs() < 1e-5, "{low} {high}");
        assert_eq!(wilson(0, 0), (0., 1.));
    }
}
