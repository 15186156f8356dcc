//! Quantiles of the normal and the chi distribution, to 1e-12 relative.

/// The x with Φ(x) = t, for 0 < t < 1: Wichura's AS 241.
pub(crate) fn normal(t: f64) -> f64 {
    let q = t - 0.5;
    if q.abs() <= 0.425 {
        return q * ratio(0.180_625 - q * q, &CENTRE);
    }
    // For t > ½ the difference 1 − t is exact.
    let tail = if q < 0.0 { t } else { 1.0 - t };
    let r = libm::sqrt(-libm::log(tail));
    let x = if r <= 5.0 { ratio(r - 1.6, &MIDDLE) } else { ratio(r - 5.0, &TAIL) };
    if q < 0.0 { -x } else { x }
}

/// Coefficients of a numerator and a denominator, lowest order first.
type Ratio = [[f64; 8]; 2];

const CENTRE: Ratio = [
    [
        3.387_132_872_796_366_5,
        1.331_416_678_917_843_8e2,
        1.971_590_950_306_551_3e3,
        1.373_169_376_550_946e4,
        4.592_195_393_154_987e4,
        6.726_577_092_700_87e4,
        3.343_057_558_358_813e4,
        2.509_080_928_730_122_7e3,
    ],
    [
        1.0,
        4.231_333_070_160_091e1,
        6.871_870_074_920_579e2,
        5.394_196_021_424_751e3,
        2.121_379_430_158_659_7e4,
        3.930_789_580_009_271e4,
        2.872_908_573_572_194_3e4,
        5.226_495_278_852_854e3,
    ],
];

const MIDDLE: Ratio = [
    [
        1.423_437_110_749_683_5,
        4.630_337_846_156_546,
        5.769_497_221_460_691,
        3.647_848_324_763_204_5,
        1.270_458_252_452_368_4,
        2.417_807_251_774_506e-1,
        2.272_384_498_926_918_4e-2,
        7.745_450_142_783_414e-4,
    ],
    [
        1.0,
        2.053_191_626_637_759,
        1.676_384_830_183_803_8,
        6.897_673_349_851e-1,
        1.481_039_764_274_800_8e-1,
        1.519_866_656_361_645_7e-2,
        5.475_938_084_995_345e-4,
        1.050_750_071_644_416_9e-9,
    ],
];

const TAIL: Ratio = [
    [
        6.657_904_643_501_103,
        5.463_784_911_164_114,
        1.784_826_539_917_291_3,
        2.965_605_718_285_048_7e-1,
        2.653_218_952_657_612_4e-2,
        1.242_660_947_388_078_4e-3,
        2.711_555_568_743_487_6e-5,
        2.010_334_399_292_288_1e-7,
    ],
    [
        1.0,
        5.998_322_065_558_88e-1,
        1.369_298_809_227_358e-1,
        1.487_536_129_085_061_5e-2,
        7.868_691_311_456_133e-4,
        1.846_318_317_510_054_8e-5,
        1.421_511_758_316_446e-7,
        2.044_263_103_389_939_8e-15,
    ],
];

fn ratio(x: f64, coefficients: &Ratio) -> f64 {
    let [numerator, denominator] =
        coefficients.map(|c| c.iter().rev().fold(0.0, |sum, c| sum * x + c));
    numerator / denominator
}

/// The y with P(a, y) = t: Newton steps on the logarithm of the smaller tail, in ln y.
pub(crate) fn gamma(a: f64, t: f64) -> f64 {
    let lower = t < 0.5;
    let target = if lower { libm::log(t) } else { libm::log(1.0 - t) };
    // Wilson & Hilferty (1931), or the leading term of the series far in the lower tail.
    let cube = 1.0 - 1.0 / (9.0 * a) + normal(t) / (3.0 * a.sqrt());
    let leading = libm::exp((libm::log(t) + libm::lgamma(a + 1.0)) / a);
    let mut y = if cube > 0.3 { a * cube * cube * cube } else { leading };
    // The relative error of Wilson & Hilferty is z·(z² − 3)/108 · a^−1.5, of the normal quantile z;
    // the sums below have some √a terms.
    if a > 1e10 {
        return y;
    }
    for _ in 0..100 {
        let (ln_p, ln_q, ln_term) = log_gamma_tails(a, y);
        // d ln P / d ln y = y^a e^{−y}/Γ(a) / P, and likewise with −Q.
        let (value, slope) = if lower {
            (ln_p, libm::exp(ln_term - ln_p))
        } else {
            (ln_q, -libm::exp(ln_term - ln_q))
        };
        let step = ((value - target) / slope).clamp(-1.0, 1.0);
        y *= libm::exp(-step);
        if step.abs() < 4e-16 {
            break;
        }
    }
    y
}

/// `ln P(a, y)`, `ln Q(a, y)` and `ln (y^a e^{−y}/Γ(a))`. The smaller tail comes from its own
/// series (lower) or continued fraction (upper), so neither loses digits to 1 − x.
fn log_gamma_tails(a: f64, y: f64) -> (f64, f64, f64) {
    let ln_term = log_gamma_term(a, y);
    if y < a + 1.0 {
        // P = y^a e^{−y}/Γ(a) Σ_n y^n / (a (a+1) ⋯ (a+n)).
        let mut term = 1.0 / a;
        let mut sum = term;
        let mut n = 1.0;
        while term > sum * 1e-17 {
            term *= y / (a + n);
            sum += term;
            n += 1.0;
        }
        let ln_p = ln_term + libm::log(sum);
        (ln_p, libm::log1p(-libm::exp(ln_p).min(1.0)), ln_term)
    } else {
        // Q = y^a e^{−y}/Γ(a) · 1/(y+1−a − 1(1−a)/(y+3−a − 2(2−a)/(y+5−a − ..))), by Lentz' method.
        let mut b = y + 1.0 - a;
        let mut c = f64::INFINITY;
        let mut d = 1.0 / b;
        let mut fraction = d;
        let mut n = 1.0;
        while n < 1e6 {
            let numerator = n * (a - n);
            b += 2.0;
            d = 1.0 / (b + numerator * d);
            c = b + numerator / c;
            let factor = c * d;
            fraction *= factor;
            if (factor - 1.0).abs() < 1e-16 {
                break;
            }
            n += 1.0;
        }
        let ln_q = ln_term + libm::log(fraction);
        (libm::log1p(-libm::exp(ln_q).min(1.0)), ln_q, ln_term)
    }
}

/// `ln (y^a e^{−y}/Γ(a))`. For large a, where y ≈ a, the big terms cancel on paper (Stirling):
/// `½ ln(a/2π) − δ(a) + a (ln(1 + u) − u)` with `u = y/a − 1` and `δ(a) = 1/12a − 1/360a³ + ..`.
fn log_gamma_term(a: f64, y: f64) -> f64 {
    if a < 10.0 {
        return a * libm::log(y) - y - libm::lgamma(a);
    }
    let u = (y - a) / a;
    let s = 1.0 / (a * a);
    let delta = (1.0 / 12.0
        - s * (1.0 / 360.0
            - s * (1.0 / 1260.0
                - s * (1.0 / 1680.0 - s * (1.0 / 1188.0 - s * 691.0 / 360_360.0)))))
        / a;
    0.5 * libm::log(a / (2.0 * core::f64::consts::PI)) - delta + a * (libm::log1p(u) - u)
}
