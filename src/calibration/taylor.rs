//! The three coefficients of the calibrated Taylor kernel: ridge least squares under the condition
//! that makes it positive.

use crate::calibration::Calibration;
use crate::calibration::linalg::solve;
use crate::check;
use crate::error::Error;
use crate::views::rows;
use ndarray::{Array1, Array2, array};

/// How the coefficients of [`CalibratedTaylor`](crate::CalibratedTaylor) are fitted. The kernel is
/// positive for every pair if and only if `c₀ + c₁s + c₂s²/2` has no real root: `c₁² < 2c₀c₂`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[non_exhaustive]
pub enum TaylorFit {
    /// The best fit among the kernels that are positive by a margin: `c₀ ≥ 0.001`, `c₁, c₂ ≥ 0`,
    /// `c₁² ≤ 2·0.98²·c₀c₂`. A convex problem, solved to its global optimum.
    #[default]
    Constrained,
    /// The best fit, with each coefficient then raised to 0.001 and `c₁` lowered to
    /// `0.98·√(2c₀c₂)`. Where that changes anything it is not the best fit of what is allowed: kept
    /// to compare with.
    Clamped,
    /// The best fit as it is. Its kernel may be negative, and
    /// [`CalibratedTaylor`](crate::CalibratedTaylor) refuses it then.
    Unconstrained,
}

/// Weight of the pull towards (1, 1, 1), in units of the diagonal.
const RIDGE: f64 = 0.02;

/// The smallest c₀.
const LEAST: f64 = 1e-3;

/// The largest `c₁/√(2c₀c₂)`.
const MARGIN: f64 = 0.98;

impl Calibration {
    /// Fits `c` of the kernel `K = e^{q̂·μ_k + μ_q·(k̂ − μ_k)}·(c₀ + c₁s + c₂s²/2)`,
    /// `s = Σ_{l<rank} x_l y_l`, to the far pairs in attention space, with a small pull to one:
    ///
    /// ```text
    /// minimise Σ_{t∈R, j∈J_t} ((K_tj − e^{q̂_t·k̂_j}) e^{−lse_t})² + 0.02·Σ_i H_ii (c_i − 1)²
    /// ```
    ///
    /// with `lse_t` over all visible keys and H the Gram matrix of the three columns.
    ///
    /// # Errors
    ///
    /// [`Error::ZeroSize`] if the rank is 0, [`Error::InvalidOption`] if it is above `head_dim`,
    /// [`Error::Overflow`] if the columns leave the range of `f64`.
    pub fn taylor_coefficients(&self, rank: usize, fit: TaylorFit) -> Result<[f64; 3], Error> {
        self.check_rank(rank)?;
        let x = (&self.pairs.queries - &self.query_mean)
            .dot(&rows(self.query_basis.view(), 0..rank).t());
        let centred = &self.pairs.keys - &self.key_mean;
        let y = centred.dot(&rows(self.key_basis.view(), 0..rank).t());
        let key_part = centred.dot(&self.query_mean);
        let (mut h, mut b) = (Array2::zeros((3, 3)), Array1::zeros(3));
        for row in self.first_used..self.pairs.queries.nrows() {
            let far = self.pairs.far(row);
            let normalizer = self.log_normalizers[row];
            let query_part = self.pairs.queries.row(row).dot(&self.key_mean) - normalizer;
            let s = rows(y.view(), far.clone()).dot(&x.row(row));
            for ((s, score), key_part) in s
                .iter()
                .zip(&self.pairs.scores(row, far.clone()))
                .zip(key_part.iter().skip(far.start))
            {
                let base = (query_part + key_part).exp();
                let column = [base, base * s, base * s * s * 0.5];
                let target = (score - normalizer).exp();
                for i in 0..3 {
                    b[i] += column[i] * target;
                    for j in 0..3 {
                        h[[i, j]] += column[i] * column[j];
                    }
                }
            }
        }
        coefficients(&h, &b, fit)
    }

    /// The coordinates a map may use are 1 to `head_dim`.
    fn check_rank(&self, rank: usize) -> Result<(), Error> {
        check::at_least_one("rank", rank)?;
        if rank <= self.head_dim() {
            return Ok(());
        }
        Err(Error::InvalidOption {
            which: "rank",
            found: rank.to_string(),
            needed: "at most the head dimension",
        })
    }
}

/// Minimises `cᵀHc − 2bᵀc + Σ_i D_i(c_i − 1)²`, `D = 0.02·diag(H)`, in the way asked for.
fn coefficients(h: &Array2<f64>, b: &Array1<f64>, fit: TaylorFit) -> Result<[f64; 3], Error> {
    let too_large = || Error::Overflow { which: "the fit of the Taylor coefficients", row: 0 };
    if !h.iter().chain(b).all(|x| x.is_finite()) {
        return Err(too_large());
    }
    // In units of its column's norm each coefficient has curvature 1 + ridge. A column that is zero
    // says nothing: only the pull is left.
    let unit = h.diag().mapv(|x| if x < f64::MIN_POSITIVE { 0.0 } else { x.sqrt() });
    let inverse = unit.mapv(|x| if x > 0.0 { x.recip() } else { 1.0 });
    let unit = inverse.mapv(f64::recip);
    let mut a = h * &inverse * inverse.view().insert_axis(ndarray::Axis(1));
    let mut right = b * &inverse;
    for i in 0..3 {
        let ridge = if h[[i, i]] < f64::MIN_POSITIVE { 1.0 } else { RIDGE };
        a[[i, i]] += ridge;
        right[i] += ridge * unit[i];
    }
    let best = solve(a.view(), &right).ok_or_else(too_large)?;
    let free = &best * &inverse;
    let [c0, c1, c2] = [free[0], free[1], free[2]];
    let result = match fit {
        TaylorFit::Unconstrained => [c0, c1, c2],
        TaylorFit::Clamped => {
            let [c0, c1, c2] = [c0, c1, c2].map(|c| c.max(LEAST));
            [c0, c1.min(MARGIN * (2.0 * c0 * c2).sqrt()), c2]
        }
        TaylorFit::Constrained => {
            if c0 >= LEAST && c1 >= 0.0 && c2 >= 0.0 && c1 * c1 <= 2.0 * MARGIN * MARGIN * c0 * c2 {
                [c0, c1, c2]
            } else {
                constrained(&a, &best, &unit)
            }
        }
    };
    if result.iter().all(|c| c.is_finite()) { Ok(result) } else { Err(too_large()) }
}

/// The minimum of `(u − u*)ᵀA(u − u*)`, u = unit·c, over the feasible c, by Newton's method with a
/// logarithmic barrier (Boyd and Vandenberghe, Convex Optimization, 11.3):
///
/// ```text
/// t/2·(u − u*)ᵀA(u − u*) − ln(κu₀u₂ − u₁²) − ln(u₀ − least) − ln u₁,    t → ∞
/// ```
///
/// The first logarithm is the barrier of the cone, convex where u₀, u₂ > 0. A barrier of degree 4
/// leaves a gap of 4/t.
fn constrained(a: &Array2<f64>, best: &Array1<f64>, unit: &Array1<f64>) -> [f64; 3] {
    // Sizes are brought to about one.
    let size = best.iter().fold(LEAST * unit[0], |m, x| m.max(x.abs()));
    let target = best / size;
    let least = LEAST * unit[0] / size;
    let kappa = 2.0 * MARGIN * MARGIN * (unit[1] / unit[0]) * (unit[1] / unit[2]);
    let barrier = |u: &Array1<f64>| {
        let cone = kappa * u[0] * u[2] - u[1] * u[1];
        if cone > 0.0 && u[0] > least && u[1] > 0.0 && u[2] > 0.0 {
            -cone.ln() - (u[0] - least).ln() - u[1].ln()
        } else {
            f64::INFINITY
        }
    };
    let value = |t: f64, u: &Array1<f64>| {
        let off = u - &target;
        0.5 * t * off.dot(&a.dot(&off)) + barrier(u)
    };
    let (first, third) = (target[0].max(2.0 * least), target[2].max(0.1));
    let mut u = array![first, 0.5 * (kappa * first * third).sqrt(), third];
    let mut t = 1.0;
    while t < 1e14 {
        for _ in 0..50 {
            let cone = kappa * u[0] * u[2] - u[1] * u[1];
            let slope = array![kappa * u[2], -2.0 * u[1], kappa * u[0]] / cone;
            let mut gradient = a.dot(&(&u - &target)) * t - &slope;
            gradient[0] -= (u[0] - least).recip();
            gradient[1] -= u[1].recip();
            let mut hessian = a * t;
            for i in 0..3 {
                for j in 0..3 {
                    hessian[[i, j]] += slope[i] * slope[j];
                }
            }
            hessian[[2, 0]] -= kappa / cone; // of the other half nothing is read
            hessian[[1, 1]] += 2.0 / cone + u[1].powi(-2);
            hessian[[0, 0]] += (u[0] - least).powi(-2);
            // The diagonal is brought to one, so that three numbers of any size can be solved for.
            let scale = hessian.diag().mapv(|x| x.sqrt().recip());
            let scaled = &hessian * &scale * scale.view().insert_axis(ndarray::Axis(1));
            let Some(step) = solve(scaled.view(), &(&gradient * &scale)).map(|x| x * &scale) else {
                break;
            };
            let decrement = gradient.dot(&step);
            let before = value(t, &u);
            // It takes the longest of the steps 1, ½, ¼, .. that is as good as it promises.
            let moved = (0..34).map(|i| 0.5_f64.powi(i)).find_map(|length| {
                let moved = &u - &(&step * length);
                (value(t, &moved) <= before - 0.1 * length * decrement).then_some(moved)
            });
            let Some(moved) = moved else { break };
            u = moved;
            if decrement < 1e-9 {
                break;
            }
        }
        t *= 8.0;
    }
    [0, 1, 2].map(|i| u[i] * size / unit[i])
}

#[cfg(test)]
#[allow(clippy::cast_precision_loss)]
mod tests {
    use super::*;

    /// The problem with columns 1, s, s²/2 at random s, and any target: H is of the kind that
    /// occurs.
    fn problem(seed: usize) -> (Array2<f64>, Array1<f64>) {
        let wave = |i: usize, f: f64| ((i * 7919 + seed * 104_729) as f64 * f).sin();
        let spread = [0.3, 1.0, 3.0][seed % 3];
        let offset = [0.0, -2.0, 1.0, 4.0][seed % 4];
        let (mut h, mut b) = (Array2::zeros((3, 3)), Array1::zeros(3));
        for i in 0..200 {
            let s = spread * (wave(i, 0.37) + wave(i, 1.13)) + offset;
            let weight = (1.5 * wave(i, 0.71)).exp() * 10_f64.powi([0, -40, 30][seed / 7 % 3]);
            let column = array![weight, weight * s, weight * s * s / 2.0];
            let target = weight * [s.exp(), (2.0 * s).exp(), wave(i, 2.3), -s][seed / 3 % 4];
            for k in 0..3 {
                h.row_mut(k).scaled_add(column[k], &column);
            }
            b.scaled_add(target, &column);
        }
        (h, b)
    }

    fn objective(h: &Array2<f64>, b: &Array1<f64>, c: &[f64; 3]) -> f64 {
        let c = Array1::from(c.to_vec());
        let pull: f64 = (0..3).map(|i| RIDGE * h[[i, i]] * (c[i] - 1.0).powi(2)).sum();
        c.dot(&h.dot(&c)) - 2.0 * b.dot(&c) + pull
    }

    #[test]
    fn constrained_fit_meets_the_optimality_conditions_and_beats_brute_force() {
        let mut active = [0; 4];
        for seed in 0..60 {
            let (h, b) = problem(seed);
            let c = coefficients(&h, &b, TaylorFit::Constrained).unwrap();
            let free = coefficients(&h, &b, TaylorFit::Unconstrained).unwrap();
            let clamped = coefficients(&h, &b, TaylorFit::Clamped).unwrap();
            let limit = 2.0 * MARGIN * MARGIN;
            let feasible = |c: &[f64; 3]| {
                c[0] >= LEAST
                    && c[1] >= 0.0
                    && c[2] >= 0.0
                    && c[1] * c[1] <= limit * c[0] * c[2] * (1.0 + 1e-12)
            };
            assert!(feasible(&c), "{seed}: {c:?}");
            if feasible(&free) {
                assert_eq!(c, free);
                active[0] += 1;
            }
            let found = objective(&h, &b, &c);
            let scale = found.abs().max(objective(&h, &b, &[0.0; 3])).max(b[0].abs() + h[[0, 0]]);
            assert!(objective(&h, &b, &free) <= found + 1e-11 * scale);
            // Brute force takes a grid of ratios around the optimum and far from it, including
            // the boundary.
            let mut best = objective(&h, &b, &clamped);
            for i in -20..=20 {
                for j in -20..=20 {
                    for l in 0..=40 {
                        for fine in [1.2_f64, 1.001] {
                            let c0 = (c[0] * fine.powi(i)).max(LEAST);
                            let c2 = c[2].max(1e-6) * fine.powi(j);
                            let c1 = (limit * c0 * c2).sqrt() * f64::from(l) / 40.0;
                            best = best.min(objective(&h, &b, &[c0, c1, c2]));
                        }
                    }
                }
            }
            assert!(found <= best + 1e-9 * scale, "{seed}: {c:?} has {found}, not {best}");
            // In a convex problem no way from the optimum into the feasible set goes down.
            let mut gradient = h.dot(&Array1::from(c.to_vec())) - &b;
            (0..3).for_each(|i| gradient[i] += RIDGE * h[[i, i]] * (c[i] - 1.0));
            let size = h.diag().mapv(f64::sqrt);
            let norm = (b.mapv(f64::abs) / &size).sum() + size.sum();
            for (i, j, l) in
                (0..7).flat_map(|i| (0..8).flat_map(move |j| (0..3).map(move |l| (i, j, l))))
            {
                let (c0, c2) =
                    (LEAST * 10_f64.powi(i), if j == 0 { 0.0 } else { LEAST * 10_f64.powi(j - 1) });
                let other = [c0, (limit * c0 * c2).sqrt() * f64::from(l) / 2.0, c2];
                let step: Array1<f64> = (0..3).map(|i| other[i] - c[i]).collect();
                let length = norm + (&step * &size).mapv(f64::abs).sum();
                assert!(gradient.dot(&step) >= -1e-10 * norm * length, "{seed}: {c:?} {other:?}");
            }
            if c[1] * c[1] > limit * c[0] * c[2] * 0.999_999 {
                active[1] += 1;
            }
            if c[0] < LEAST * 1.001 {
                active[2] += 1;
            }
            if c[1] < 1e-6 {
                active[3] += 1;
            }
        }
        assert!(active.iter().all(|n| *n > 2), "every kind of solution occurs: {active:?}");
    }

    #[test]
    fn columns_without_content_leave_the_coefficients_at_one() {
        let mut h = Array2::zeros((3, 3));
        let nothing = coefficients(&h, &Array1::zeros(3), TaylorFit::Unconstrained).unwrap();
        assert_eq!(nothing, [1.0; 3]);
        h[[0, 0]] = 4.0;
        let mean = coefficients(&h, &array![4.0, 0.0, 0.0], TaylorFit::Constrained).unwrap();
        assert!(mean.iter().all(|c| (c - 1.0).abs() < 1e-12));
        h[[1, 1]] = f64::INFINITY;
        assert!(coefficients(&h, &Array1::zeros(3), TaylorFit::Clamped).is_err());
    }
}
