use nalgebra::{DMatrix, DVector, SymmetricEigen};

use crate::{Error, Result};

/// Mean and covariance of features, gathered row by row.
#[derive(Clone, Debug)]
pub struct Moments {
    count: f64,
    sum: DVector<f64>,
    products: DMatrix<f64>,
}

impl Moments {
    /// Of features of this many values.
    pub fn new(width: usize) -> Self {
        Self { count: 0., sum: DVector::zeros(width), products: DMatrix::zeros(width, width) }
    }

    /// One picture's features.
    pub fn add(&mut self, features: &[f32]) {
        let row = DVector::from_iterator(features.len(), features.iter().map(|v| f64::from(*v)));
        self.products += &row * row.transpose();
        self.sum += row;
        self.count += 1.;
    }

    fn mean_and_covariance(&self) -> (DVector<f64>, DMatrix<f64>) {
        let mean = &self.sum / self.count;
        let covariance = (&self.products - &mean * self.sum.transpose()) / (self.count - 1.);
        (mean, covariance)
    }
}

/// The Frechet distance between the normal distributions of two sets of features (arXiv 1706.08500):
/// `|m1 - m2|^2 + tr(C1 + C2 - 2 (C1^1/2 C2 C1^1/2)^1/2)`. Fails below two rows each.
pub fn frechet_distance(a: &Moments, b: &Moments) -> Result<f64> {
    if a.count < 2. || b.count < 2. {
        return Err(Error::Request(format!("a Frechet distance between {} and {} pictures", a.count, b.count)));
    }
    let ((mean_a, a), (mean_b, b)) = (a.mean_and_covariance(), b.mean_and_covariance());
    let root = square_root(a.clone());
    let cross = square_root(&root * &b * &root);
    Ok((mean_a - mean_b).norm_squared() + a.trace() + b.trace() - 2. * cross.trace())
}

/// Of a symmetric matrix without negative eigenvalues but for rounding.
fn square_root(matrix: DMatrix<f64>) -> DMatrix<f64> {
    let symmetric = (&matrix + matrix.transpose()) * 0.5;
    let SymmetricEigen { eigenvectors, eigenvalues } = SymmetricEigen::new(symmetric);
    let roots = DMatrix::from_diagonal(&eigenvalues.map(|value| value.max(0.).sqrt()));
    &eigenvectors * roots * eigenvectors.transpose()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::world::Random;

    fn moments(seed: u64, shift: f32, stretch: f32) -> Moments {
        let mut random = Random::new(seed, 0);
        let mut moments = Moments::new(2);
        (0..20_000).for_each(|_| moments.add(&[shift + stretch * random.normal(), random.normal()]));
        moments
    }

    /// Of normal distributions along axes: the distance of the means, and of the deviations, squared.
    #[test]
    fn between_normal_distributions() {
        let one = moments(1, 0., 1.);
        assert!(frechet_distance(&one, &one).unwrap().abs() < 1e-9);
        let found = frechet_distance(&one, &moments(2, 3., 2.)).unwrap();
        assert!((found - 10.).abs() < 0.3, "{found}");
        let message = frechet_distance(&one, &Moments::new(2)).unwrap_err().to_string();
        assert!(message.contains("0 pictures"), "{message}");
    }

    /// Turned by 45 degrees: the same numbers, through matrices that do not commute with the axes'.
    #[test]
    fn turns_change_nothing() {
        let turned = |seed, stretch: f32| {
            let mut random = Random::new(seed, 0);
            let mut moments = Moments::new(2);
            for _ in 0..20_000 {
                let (x, y) = (stretch * random.normal(), random.normal());
                moments.add(&[(x - y) / 2f32.sqrt(), (x + y) / 2f32.sqrt()]);
            }
            moments
        };
        let found = frechet_distance(&turned(1, 1.), &turned(2, 3.)).unwrap();
        assert!((found - 4.).abs() < 0.15, "{found}");
    }
}
