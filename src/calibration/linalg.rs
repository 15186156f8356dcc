//! The little linear algebra of a calibration, in f64: symmetric eigenvalues (cyclic Jacobi),
//! Cholesky.

use ndarray::{Array1, Array2, ArrayView2, Axis};

/// Sweeps over all pairs at most; convergence is quadratic, and ten are plenty.
const SWEEPS: usize = 60;

/// Eigenvalues of a symmetric matrix in descending order, and the unit eigenvectors as *rows*, each
/// with its largest element positive: `A = Uᵀ diag(e) U`.
///
/// Cyclic Jacobi: rotations `A ← JᵀAJ` that set one pair of elements after the other to zero, until
/// none is above rounding (Golub and Van Loan, algorithm 8.5.3).
pub(super) fn symmetric_eigen(matrix: ArrayView2<'_, f64>) -> (Array1<f64>, Array2<f64>) {
    let d = matrix.nrows();
    let negligible =
        matrix.diag().fold(f64::MIN_POSITIVE, |m, x| m.max(1e-3 * f64::EPSILON * x.abs()));
    // They are kept as rows, to rotate them as slices.
    let mut a: Vec<Vec<f64>> = matrix.outer_iter().map(|row| row.to_vec()).collect();
    let mut u: Vec<Vec<f64>> = Array2::<f64>::eye(d).outer_iter().map(|row| row.to_vec()).collect();
    for _ in 0..SWEEPS {
        let mut rotated = false;
        for p in 0..d {
            for q in p + 1..d {
                let off = a[p][q];
                let product = a[p][p].abs().sqrt() * a[q][q].abs().sqrt();
                if off.abs() <= negligible.max(0.5 * f64::EPSILON * product) {
                    continue;
                }
                rotated = true;
                let theta = (a[q][q] - a[p][p]) / (2.0 * off);
                let tangent = theta.signum() / (theta.abs() + theta.hypot(1.0));
                let cosine = tangent.hypot(1.0).recip();
                let sine = tangent * cosine;
                rotate(&mut a, p, q, cosine, sine);
                for row in &mut a {
                    (row[p], row[q]) =
                        (cosine * row[p] - sine * row[q], sine * row[p] + cosine * row[q]);
                }
                (a[p][q], a[q][p]) = (0.0, 0.0);
                rotate(&mut u, p, q, cosine, sine);
            }
        }
        if !rotated {
            break;
        }
    }
    let mut order: Vec<usize> = (0..d).collect();
    order.sort_by(|&i, &j| a[j][j].total_cmp(&a[i][i]));
    let values = order.iter().map(|&i| a[i][i]).collect();
    let mut vectors = Array2::zeros((d, d));
    for (mut vector, &i) in vectors.outer_iter_mut().zip(&order) {
        let largest = u[i].iter().fold(0.0_f64, |m, x| if x.abs() > m.abs() { *x } else { m });
        vector.iter_mut().zip(&u[i]).for_each(|(to, x)| *to = x * largest.signum());
    }
    (values, vectors)
}

/// Rotates rows p < q.
fn rotate(rows: &mut [Vec<f64>], p: usize, q: usize, cosine: f64, sine: f64) {
    let (first, second) = rows.split_at_mut(q);
    for (x, y) in first[p].iter_mut().zip(&mut second[0]) {
        (*x, *y) = (cosine * *x - sine * *y, sine * *x + cosine * *y);
    }
}

/// The lower triangular `L` with `LLᵀ = A`, or `None` if `A` is not positive definite within
/// rounding.
pub(super) fn cholesky(matrix: ArrayView2<'_, f64>) -> Option<Array2<f64>> {
    let d = matrix.nrows();
    let mut lower = Array2::<f64>::zeros((d, d));
    for i in 0..d {
        for j in 0..=i {
            let known: f64 = (0..j).map(|l| lower[[i, l]] * lower[[j, l]]).sum();
            let rest = matrix[[i, j]] - known;
            if i == j {
                if !(rest > 0.0 && rest.is_finite()) {
                    return None;
                }
                lower[[i, i]] = rest.sqrt();
            } else {
                lower[[i, j]] = rest / lower[[j, j]];
            }
        }
    }
    Some(lower)
}

/// The inverse of a lower triangular matrix, by forward substitution.
pub(super) fn inverse_of_lower(lower: ArrayView2<'_, f64>) -> Array2<f64> {
    let d = lower.nrows();
    let mut inverse = Array2::<f64>::zeros((d, d));
    for i in 0..d {
        let (above, mut rest) = inverse.view_mut().split_at(Axis(0), i);
        let mut row = rest.row_mut(0);
        row[i] = 1.0;
        for (l, known) in above.outer_iter().enumerate() {
            row.scaled_add(-lower[[i, l]], &known);
        }
        row /= lower[[i, i]];
    }
    inverse
}

/// `A⁻¹b` for a positive definite `A`, or `None`.
pub(super) fn solve(matrix: ArrayView2<'_, f64>, right: &Array1<f64>) -> Option<Array1<f64>> {
    let inverse = inverse_of_lower(cholesky(matrix)?.view());
    Some(inverse.t().dot(&inverse.dot(right)))
}

#[cfg(test)]
#[allow(clippy::cast_precision_loss)]
mod tests {
    use super::*;

    fn random(n: usize, d: usize) -> Array2<f64> {
        // It is a fixed stream that looks random.
        let mut state = 1_u64;
        Array2::from_shape_simple_fn((n, d), || {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            (state >> 11) as f64 / 2_f64.powi(53) - 0.5
        })
    }

    fn close(a: &Array2<f64>, b: &Array2<f64>, slack: f64) {
        assert!((a - b).iter().all(|x| x.abs() < slack), "{a} {b}");
    }

    #[test]
    fn eigenvectors_diagonalise() {
        for (n, d) in [(1, 1), (9, 2), (3, 7), (80, 33), (64, 64)] {
            let x = random(n, d);
            let a = x.t().dot(&x);
            let (values, u) = symmetric_eigen(a.view());
            close(&u.dot(&u.t()), &Array2::eye(d), 1e-13);
            close(
                &u.t().dot(&(&u * &values.view().insert_axis(Axis(1)))),
                &a,
                1e-13 * a.diag().sum(),
            );
            assert!(values.windows(2).into_iter().all(|w| w[0] >= w[1]));
        }
        let (values, u) = symmetric_eigen(Array2::zeros((3, 3)).view());
        assert_eq!((values, u), (Array1::zeros(3), Array2::eye(3)));
    }

    #[test]
    fn cholesky_factors_and_solves() {
        for d in [1, 2, 10, 40] {
            let x = random(3 * d, d);
            let a = x.t().dot(&x) + Array2::<f64>::eye(d) * 1e-3;
            let lower = cholesky(a.view()).unwrap();
            close(&lower.dot(&lower.t()), &a, 1e-13 * a.diag().sum());
            close(&inverse_of_lower(lower.view()).dot(&lower), &Array2::eye(d), 1e-11);
            let b = random(1, d).row(0).to_owned();
            let rest = a.dot(&solve(a.view(), &b).unwrap()) - &b;
            assert!(rest.iter().all(|x| x.abs() < 1e-11));
        }
        let mut indefinite = Array2::eye(2);
        indefinite[[0, 1]] = 2.0;
        indefinite[[1, 0]] = 2.0;
        assert!(cholesky(indefinite.view()).is_none());
    }
}
