/// The normal distribution's quantile for two-sided intervals at 95 %.
const Z: f64 = 1.959_964;

/// Wilson's interval for a share of `hits` in `trials`, at 95 %.
pub fn wilson(hits: usize, trials: usize) -> (f64, f64) {
    if trials == 0 {
        return (0., 1.);
    }
    let (n, p) = (trials as f64, hits as f64 / trials as f64);
    let middle = p + Z * Z / (2. * n);
    let spread = Z * (p * (1. - p) / n + Z * Z / (4. * n * n)).sqrt();
    let scale = 1. + Z * Z / n;
    ((middle - spread) / scale, (middle + spread) / scale)
}

/// By how much the share of hits is higher in `second` than in `first`, on the same trials, and Agresti and Min's interval for
/// that at 95 %: half a trial more of each of the four outcomes. Panics where the trials are not as many.
pub fn paired_difference(first: &[bool], second: &[bool]) -> (f64, (f64, f64)) {
    assert_eq!(first.len(), second.len(), "paired trials");
    let only = |a: &[bool], b: &[bool]| a.iter().zip(b).filter(|(a, b)| **a && !**b).count() as f64;
    let (lost, won, n) = (only(first, second), only(second, first), first.len() as f64);
    let (middle, trials, apart) = ((won - lost) / (n + 2.), n + 2., won + lost + 1.);
    let spread = Z * (apart - (won - lost).powi(2) / trials).sqrt() / trials;
    ((won - lost) / n.max(1.), (middle - spread, middle + spread))
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

    /// 10 trials lost and 20 won of 100: (20.5 - 10.5) / 102 and 1.96 sqrt(31 - 10^2 / 102) / 102.
    #[test]
    fn paired_trials() {
        let first: Vec<bool> = (0..100).map(|i| i < 50).collect();
        let second: Vec<bool> = (0..100).map(|i| (10..70).contains(&i)).collect();
        let (difference, (low, high)) = paired_difference(&first, &second);
        assert!((difference - 0.1).abs() < 1e-12);
        assert!((low + 0.007_24).abs() < 1e-4 && (high - 0.203_32).abs() < 1e-4, "{low} {high}");
        let (same, (low, high)) = paired_difference(&first, &first);
        assert!(same == 0. && low < 0. && high == -low);
    }
}
