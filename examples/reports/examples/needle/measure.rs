//! Runs every kernel over every stream and counts right answers.

use crate::kernels::{KERNELS, Kernel};
use crate::task::{HEAD_DIM, Sort, Task};
use dijiang::Error;
use ndarray::{Array2, s};
use rayon::prelude::*;

/// What a run measures.
#[derive(Debug)]
pub struct Plan {
    pub distances: Vec<usize>,
    pub loads: Vec<usize>,
    /// While the distance varies.
    pub load: usize,
    /// While the load varies.
    pub distance: usize,
    pub seeds: u64,
    /// The command that repeats this run, free of paths.
    pub command: String,
}

/// What varies along a curve.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Curve {
    Distance,
    Load,
}

impl Curve {
    pub const ALL: [Self; 2] = [Self::Distance, Self::Load];

    pub fn name(self) -> &'static str {
        match self {
            Self::Distance => "distance",
            Self::Load => "load",
        }
    }

    pub fn points(self, plan: &Plan) -> &[usize] {
        match self {
            Self::Distance => &plan.distances,
            Self::Load => &plan.loads,
        }
    }

    /// What does not vary.
    pub fn fixed(self, plan: &Plan) -> String {
        match self {
            Self::Distance => format!("load {}", plan.load),
            Self::Load => format!("distance {}", plan.distance),
        }
    }
}

/// Right answers among those asked for.
#[derive(Clone, Copy, Debug, Default)]
pub struct Score {
    pub right: u64,
    pub asked: u64,
}

impl Score {
    pub fn accuracy(self) -> f64 {
        self.right as f64 / self.asked.max(1) as f64
    }

    /// Wilson's 95 % interval, as if all answers were independent.
    pub fn interval(self) -> [f64; 2] {
        const Z: f64 = 1.96;
        let (p, n) = (self.accuracy(), self.asked.max(1) as f64);
        let centre = (p + Z * Z / (2.0 * n)) / (1.0 + Z * Z / n);
        let half = Z / (1.0 + Z * Z / n) * (p * (1.0 - p) / n + Z * Z / (4.0 * n * n)).sqrt();
        [(centre - half).max(0.0), (centre + half).min(1.0)]
    }
}

/// Everything a run has measured.
#[derive(Debug)]
pub struct Results {
    /// By sort, curve and kernel, in the order of their lists; a score for each point.
    scores: Vec<Vec<Score>>,
    /// Numbers in the state of each kernel after the longest stream.
    pub state_floats: Vec<usize>,
}

impl Results {
    pub fn scores(&self, sort: Sort, curve: Curve, kernel: usize) -> &[Score] {
        &self.scores[place(sort, curve, kernel)]
    }
}

fn place(sort: Sort, curve: Curve, kernel: usize) -> usize {
    (sort as usize * Curve::ALL.len() + curve as usize) * KERNELS.len() + kernel
}

/// One stream.
struct Job {
    sort: Sort,
    curve: Curve,
    load: usize,
    distances: Vec<usize>,
    /// The place of its first distance in the curve.
    point: usize,
    seed: u64,
}

/// Measures what the plan asks for.
pub fn measure(plan: &Plan) -> Result<Results, Error> {
    let mut jobs = Vec::new();
    for sort in Sort::ALL {
        for seed in 0..plan.seeds {
            let (curve, load) = (Curve::Distance, plan.load);
            jobs.push(Job { sort, curve, load, distances: plan.distances.clone(), point: 0, seed });
            jobs.extend(plan.loads.iter().enumerate().map(|(point, &load)| Job {
                sort,
                curve: Curve::Load,
                load,
                distances: vec![plan.distance],
                point,
                seed,
            }));
        }
    }
    let answers = jobs
        .par_iter()
        .with_max_len(1)
        .map(|job| {
            let task = Task::new(job.sort, job.load, &job.distances, job.seed);
            KERNELS.iter().map(|kernel| ask(kernel, &task, job)).collect::<Result<Vec<_>, _>>()
        })
        .collect::<Result<Vec<_>, _>>()?;

    let mut scores: Vec<Vec<Score>> = Vec::new();
    for _ in Sort::ALL {
        for curve in Curve::ALL {
            scores.extend(KERNELS.iter().map(|_| vec![Score::default(); curve.points(plan).len()]));
        }
    }
    let mut state_floats = vec![0; KERNELS.len()];
    for (job, answers) in jobs.iter().zip(answers) {
        for (kernel, (of_distances, floats)) in answers.into_iter().enumerate() {
            state_floats[kernel] = floats.max(state_floats[kernel]);
            let totals = &mut scores[place(job.sort, job.curve, kernel)][job.point..];
            for (total, score) in totals.iter_mut().zip(of_distances) {
                total.right += score.right;
                total.asked += score.asked;
            }
        }
    }
    Ok(Results { scores, state_floats })
}

/// The scores at each distance, and the size of the state in the end.
fn ask(kernel: &Kernel, task: &Task, job: &Job) -> Result<(Vec<Score>, usize), Error> {
    let mut scores = vec![Score::default(); job.distances.len()];
    let mut stream = (kernel.build)(job.seed)?.stream(HEAD_DIM)?;
    let mut unread = Array2::zeros((task.tokens.q.nrows(), HEAD_DIM));
    let mut output = Array2::zeros((1, HEAD_DIM));
    for (i, question) in task.questions.iter().enumerate() {
        let next = s![stream.len()..question.position, ..];
        let [q, k, v] = [&task.tokens.q, &task.tokens.k, &task.tokens.v].map(|x| x.slice(next));
        stream.extend(q, k, v, unread.slice_mut(next))?;
        // the stream itself is never asked
        let row = s![i..=i, ..];
        let [q, k, v] = [&task.asking.q, &task.asking.k, &task.asking.v].map(|x| x.slice(row));
        stream.clone().extend(q, k, v, output.view_mut())?;
        let score = &mut scores[question.distance];
        score.asked += 1;
        score.right += u64::from(task.nearest(output.row(0)) == question.answer);
    }
    Ok((scores, stream.state_floats()))
}
