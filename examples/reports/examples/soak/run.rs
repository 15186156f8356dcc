//! A stream, its tokens, and what is found on the way.

use crate::kernels::{Oracle, Subject};
use crate::tokens::{Tokens, VALUE_DIM};
use dijiang::{Stream, StreamState};
use indicatif::ProgressBar;
use ndarray::{Array2, s};
use reports::lengths::lengths;
use serde::{Deserialize, Serialize};
use std::error::Error;
use std::time::Instant;

/// Tokens of the calls, in turn: decode steps, and chunks.
const CALLS: [usize; 8] = [1, 1, 64, 1, 7, 512, 1, 33];

/// Every so many calls one is tried that must be refused.
const SLIP: usize = 50;

/// The largest error that is allowed, in units of epsilon.
const MOST: f64 = 256.0;

/// A stream on its way.
pub struct Run<'a> {
    subject: &'a Subject,
    text: Tokens,
    stream: Box<dyn Stream<f32>>,
    pub place: Place,
}

/// Where it is, and what its answers were.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Place {
    pub tokens: usize,
    pub calls: usize,
    /// FNV-1a of the bits of all answers.
    pub print: u64,
}

/// What was found.
#[derive(Debug)]
pub struct Found {
    pub seconds: f64,
    pub floats: usize,
    pub refused: usize,
    /// The largest errors up to each of [`lengths`], in units of epsilon.
    pub errors: Vec<f64>,
    pub print: u64,
}

impl<'a> Run<'a> {
    pub fn new(subject: &'a Subject) -> Result<Self, Box<dyn Error>> {
        let stream = subject.kernel.stream(VALUE_DIM)?;
        let place = Place { print: 0xcbf2_9ce4_8422_2325, ..Place::default() };
        Ok(Self { subject, text: Tokens::new()?, stream, place })
    }

    pub fn save(&self) -> Result<StreamState<f32>, Box<dyn Error>> {
        Ok(self.stream.save()?)
    }

    pub fn restore(
        &mut self,
        place: Place,
        state: &StreamState<f32>,
    ) -> Result<(), Box<dyn Error>> {
        self.stream.restore(state)?;
        self.place = place;
        Ok(())
    }

    /// The next call, with at most so many tokens.
    pub fn call(&mut self, most: usize) -> Result<[Array2<f32>; 2], Box<dyn Error>> {
        let n = CALLS[self.place.calls % CALLS.len()].min(most);
        let [mut q, k, v] = self.text.read(self.place.tokens, n);
        if self.subject.asks_nothing() {
            // every other call asks for the mean of all, the others for what a model would
            if self.place.calls.is_multiple_of(2) {
                q.fill(0.0);
            }
        }
        let mut out = Array2::from_elem((n, VALUE_DIM), f32::NAN);
        self.stream.extend(q.view(), k.view(), v.view(), out.view_mut())?;
        for x in &out {
            self.place.print ^= u64::from(x.to_bits());
            self.place.print = self.place.print.wrapping_mul(0x0100_0000_01b3);
        }
        self.place.tokens += n;
        self.place.calls += 1;
        Ok([q, out])
    }

    /// To so many tokens, with slips, beside the oracle.
    pub fn to(mut self, tokens: usize, bar: Option<&ProgressBar>) -> Result<Found, Box<dyn Error>> {
        let name = self.subject.name;
        let (floats, lengths) = (self.stream.state_floats(), lengths(tokens));
        let (mut refused, mut worst, mut errors) = (0, 0.0_f64, Vec::new());
        let (mut oracle, mut seconds) = (self.subject.oracle(), 0.0);
        while self.place.tokens < tokens {
            if self.place.calls.is_multiple_of(SLIP) {
                refused += self.slip()?;
            }
            let from = self.place.tokens;
            let next = lengths.iter().find(|&&n| n > from).map_or(tokens, |&n| n);
            let start = Instant::now();
            let [q, out] = self.call(next - from)?;
            seconds += start.elapsed().as_secs_f64();
            if bar.is_some() {
                worst = worst.max(self.error(&mut oracle, from, &q, &out)?);
            }
            if self.place.tokens == next {
                errors.push(worst);
                bar.inspect(|bar| bar.inc((next - from) as u64));
            } else {
                bar.inspect(|bar| bar.inc(out.nrows() as u64));
            }
        }
        if worst > MOST {
            return Err(format!("{name}: an error of {worst} epsilon").into());
        }
        if bar.is_some() && self.stream.state_floats() != floats {
            return Err(format!("{name}: its state grew").into());
        }
        if self.stream.len() != tokens {
            return Err(format!("{name}: tokens were lost").into());
        }
        Ok(Found { seconds, floats, refused, errors, print: self.place.print })
    }

    /// How far the last answer of a call is from what is known.
    fn error(
        &self,
        oracle: &mut Oracle,
        from: usize,
        q: &Array2<f32>,
        out: &Array2<f32>,
    ) -> Result<f64, Box<dyn Error>> {
        const LARGEST: f64 = 5.0; // of the values
        let n = q.nrows();
        let [_, k, v] = self.text.read(from, n);
        oracle.absorb(k.view(), v.view())?;
        if let Some(x) = out.iter().find(|x| !x.is_finite()) {
            return Err(format!("{}: {x} behind token {from}", self.subject.name).into());
        }
        let ones = out.column(0).fold(0.0_f64, |worst, &x| worst.max((f64::from(x) - 1.0).abs()));
        let mut worst = ones;
        if !self.subject.asks_nothing() || q.row(n - 1).iter().all(|&x| x == 0.0) {
            let known = oracle.answer(q.row(n - 1), out.row(n - 1), &self.text)?;
            for (&x, known) in out.row(n - 1).iter().zip(known) {
                worst = worst.max((f64::from(x) - known).abs() / LARGEST);
            }
        }
        Ok(worst / f64::from(f32::EPSILON))
    }

    /// Calls that must be refused and leave no trace; gives their number.
    fn slip(&mut self) -> Result<usize, Box<dyn Error>> {
        let before = self.stream.save()?;
        let n = 1 + self.place.calls / SLIP % 70;
        let good = self.text.read(self.place.tokens, n);
        let mut all = Vec::new();
        for (which, x) in good.iter().enumerate() {
            for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                let mut changed = good.clone();
                changed[which][[n - 1, x.ncols() - 1]] = bad;
                all.push(changed);
            }
            let mut narrow = good.clone();
            narrow[which] = x.slice(s![.., 1..]).to_owned();
            all.push(narrow);
        }
        for [q, k, v] in &all {
            let mut out = Array2::zeros((n, VALUE_DIM));
            if self.stream.extend(q.view(), k.view(), v.view(), out.view_mut()).is_ok() {
                return Err(format!("{}: a bad call was taken", self.subject.name).into());
            }
        }
        if self.stream.save()? != before {
            return Err(format!("{}: a bad call left a trace", self.subject.name).into());
        }
        Ok(all.len())
    }
}
