//! The report as a person runs it: bad input gives one clear sentence and exit code 2, good input a
//! table, a CSV file and a page that needs nothing else.

use crate::common::run_example;
use half::{bf16, f16};
use safetensors::tensor::{Dtype, TensorView, serialize};
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::process::Output;

fn folder(name: &str) -> PathBuf {
    let path = std::env::temp_dir().join(format!("dijiang-{name}-{}", std::process::id()));
    std::fs::create_dir_all(&path).unwrap();
    path
}

fn run(arguments: &[&str]) -> Output {
    run_example("approximation_error", arguments)
}

#[track_caller]
fn refused(arguments: &[&str], says: &str) {
    let output = run(arguments);
    let error = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(2), "{arguments:?}: {error}");
    assert_eq!(error.trim_end().lines().count(), 1, "{arguments:?}: {error}");
    assert!(error.contains(says), "{arguments:?}: `{error}` does not say `{says}`");
}

const TOKENS: usize = 20;
const D: usize = 8;

/// Numbers that every type holds exactly.
fn numbers(seed: usize) -> Vec<f64> {
    (0..TOKENS * D).map(|i| ((i * 7 + seed * 13) % 17) as f64 / 8.0 - 1.0).collect()
}

fn bytes(dtype: Dtype, x: &[f64]) -> Vec<u8> {
    match dtype {
        Dtype::F64 => x.iter().flat_map(|x| x.to_le_bytes()).collect(),
        Dtype::F32 => x.iter().flat_map(|x| (*x as f32).to_le_bytes()).collect(),
        Dtype::F16 => x.iter().flat_map(|x| f16::from_f64(*x).to_le_bytes()).collect(),
        Dtype::BF16 => x.iter().flat_map(|x| bf16::from_f64(*x).to_le_bytes()).collect(),
        _ => x.iter().flat_map(|x| (*x as i64).to_le_bytes()).collect(),
    }
}

type Tensor = (&'static str, Dtype, Vec<usize>, Vec<f64>);

/// A file with the tensors `h/<name>`.
fn write(path: &Path, tensors: &[Tensor]) {
    write_with(path, tensors, None);
}

fn write_with(path: &Path, tensors: &[Tensor], metadata: Option<HashMap<String, String>>) {
    let data: Vec<Vec<u8>> = tensors.iter().map(|(_, dtype, _, x)| bytes(*dtype, x)).collect();
    let views = tensors.iter().zip(&data).map(|((name, dtype, shape, _), data)| {
        (format!("h/{name}"), TensorView::new(*dtype, shape.clone(), data).unwrap())
    });
    std::fs::write(path, serialize(views, metadata).unwrap()).unwrap();
}

fn good(dtype: Dtype) -> Vec<Tensor> {
    ["q", "k", "v"]
        .into_iter()
        .enumerate()
        .map(|(i, name)| (name, dtype, vec![TOKENS, D], numbers(i)))
        .collect()
}

#[test]
fn bad_files_get_one_sentence() {
    let folder = folder("bad");
    let path = folder.join("heads.safetensors");
    let shown = path.to_str().unwrap();
    // every sentence names the file
    let refused_file = |says: &str| {
        refused(&["--quick", "--input", shown], says);
        refused(&["--quick", "--input", shown], shown);
    };

    refused_file("cannot be read");
    std::fs::write(&path, "").unwrap();
    refused_file("is empty");
    write(&path, &good(Dtype::F32));
    let whole = std::fs::read(&path).unwrap();
    std::fs::write(&path, &whole[..whole.len() - 5]).unwrap();
    refused_file("not a whole safetensors file");
    write(&path, &good(Dtype::F32)[..2]);
    refused_file("`h/v` is missing");
    refused_file("`h/q` (F32 [20, 8])");
    write(&path, &[("weights", Dtype::F32, vec![TOKENS, D], numbers(0))]);
    refused_file("holds no head: in it are `h/weights` (F32 [20, 8])");
    refused_file("name the tensors of each head `<head>/q`");
    write(&path, &good(Dtype::I64));
    refused_file("I64");
    for (which, bad) in [(0, f64::NAN), (2, f64::INFINITY)] {
        let mut tensors = good(Dtype::F32);
        tensors[which].3[9] = bad;
        write(&path, &tensors);
        refused_file("token 1, column 1");
    }
    let mut tensors = good(Dtype::F32);
    tensors[1].2 = vec![TOKENS * D];
    write(&path, &tensors);
    refused_file("`h/k`");
    let mut tensors = good(Dtype::F32);
    tensors[2] = ("v", Dtype::F32, vec![TOKENS / 2, D], numbers(2)[..TOKENS / 2 * D].to_vec());
    write(&path, &tensors);
    refused_file("must agree");

    let strides =
        |stride: &str| HashMap::from([("h/calibration/stride".to_owned(), stride.to_owned())]);
    for bad in ["0", "-1", "third"] {
        write_with(&path, &good(Dtype::F32), Some(strides(bad)));
        refused_file(&format!("the metadata `h/calibration/stride` is `{bad}`"));
    }
    std::fs::remove_dir_all(folder).unwrap();
}

/// A file with this header and so many bytes behind it.
fn with_header(path: &Path, header: &str, bytes: usize) {
    let length = (header.len() as u64).to_le_bytes();
    std::fs::write(path, [&length[..], header.as_bytes(), &vec![0; bytes]].concat()).unwrap();
}

#[test]
fn files_of_other_kinds_are_named() {
    let folder = folder("kinds");
    let path = folder.join("heads.safetensors");
    let shown = path.to_str().unwrap();
    let refused_file = |says: &str| refused(&["--quick", "--input", shown], says);
    let kinds: [(&[u8], &str); 6] = [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (b"\x80\x02}q\x00.", "a pickle of Python: save q, k and v with"),
        (b"PK\x03\x04\0\0\0\0\0\0", "a zip archive, as `torch.save`"),
        (b"\x93NUMPY\x01\0", "an array of NumPy"),
        (b"GGUF\x03\0\0\0", "a GGUF file"),
        (b"\xff\xff\xff\xff\xff\xff\xff\x7f{}", "it was cut off"),
    ];
    for (bytes, says) in kinds {
        std::fs::write(&path, bytes).unwrap();
        refused_file(says);
    }
    let entry = |name: &str, from: usize, to: usize| {
        format!("\"{name}\":{{\"dtype\":\"F32\",\"shape\":[1,1],\"data_offsets\":[{from},{to}]}}")
    };
    let all = |entries: &[String]| format!("{{{}}}", entries.join(","));
    with_header(&path, &all(&[entry("h/q", 0, 4), entry("h/q", 0, 4)]), 4);
    refused_file("`h/q` is there twice");
    with_header(&path, &all(&[entry("h/q", 0, 4), entry("h/k", 0, 4)]), 4);
    refused_file("overlap");
    with_header(&path, &all(&[entry("h/q", 0, 4)]), 12);
    refused_file("shorter or longer than its header says");
    write(&path, &["q", "k", "v"].map(|name| (name, Dtype::F32, vec![0, D], Vec::new())));
    refused_file("holds no tokens");
    std::fs::remove_dir_all(folder).unwrap();
}

/// Whole layers come in with a head for each of their heads; groups share keys and values.
#[test]
fn heads_of_layers_are_taken_apart() {
    let folder = folder("layers");
    let path = folder.join("heads.safetensors");
    let shown = path.to_str().unwrap();
    let stacked = |of: [usize; 3], shape: &dyn Fn(usize) -> Vec<usize>| -> Vec<Tensor> {
        let tensor = |(name, heads): (&'static str, usize)| {
            let x: Vec<f64> = (0..2 * heads).flat_map(|i| numbers(i + name.len())).collect();
            let shape = shape(heads);
            let x = x[..shape.iter().product()].to_vec();
            (name, Dtype::F32, shape, x)
        };
        ["q", "k", "v"].into_iter().zip(of).map(tensor).collect()
    };
    let four = |heads: usize| vec![2, heads, TOKENS, D];
    let three = |heads: usize| vec![heads, TOKENS, D];
    let names = |tensors: &[Tensor]| -> Vec<String> {
        write(&path, tensors);
        let (_, records, _) =
            report(&folder, &["--quick", "--input", shown, "--kernels", "taylor"]);
        let maps = records.iter().filter(|r| r["kernel"] == "taylor" && r["real"] == "true");
        maps.map(|record| record["input"].clone()).collect()
    };
    let layer = names(&stacked([4, 2, 2], &four));
    let expected: Vec<String> =
        (0..2).flat_map(|b| (0..4).map(move |h| format!("h[{b},{h}]"))).collect();
    assert_eq!(layer, expected);
    assert_eq!(names(&stacked([2, 1, 1], &three)), ["h[0]", "h[1]"]);

    for (of, shape, says) in [
        ([4, 3, 3], &four as &dyn Fn(usize) -> Vec<usize>, "a multiple of those of k and v"),
        ([4, 2, 1], &four, "must agree"),
        ([2, 2, 2], &|heads| vec![1, 1, heads, TOKENS, D], "[batch, heads, tokens, d]"),
    ] {
        write(&path, &stacked(of, shape));
        refused(&["--quick", "--input", shown], says);
    }
    let mut bad = stacked([2, 1, 1], &three);
    bad[0].3[TOKENS * D + 9] = f64::NAN;
    write(&path, &bad);
    refused(&["--quick", "--input", shown], "head 1, token 1, column 1");
    std::fs::remove_dir_all(folder).unwrap();
}

/// Values or keys of zeros leave nothing to compare, and nothing to draw on a logarithmic axis.
#[test]
fn heads_without_content_are_drawn() {
    let folder = folder("zeros");
    let path = folder.join("heads.safetensors");
    for place in [1, 2] {
        let mut tensors = long_head();
        tensors[place].3.fill(0.0);
        write(&path, &tensors);
        let (printed, _, page) = report(&folder, &["--quick", "--input", path.to_str().unwrap()]);
        for text in [printed, page] {
            assert!(!text.contains("NaN") && !text.contains("no: inf"), "{text}");
        }
    }
    std::fs::remove_dir_all(folder).unwrap();
}

#[test]
fn bad_options_get_one_sentence() {
    refused(&["--kernels", "performer,performr"], "performr");
    refused(&["--kernels", "retention"], "maps, hybrids, rivals, performer, ");
    refused(&["--kernels", "retention"], "retention-first");
    refused(&["--features", "0"], "--features 0");
    refused(&["--features", "many"], "many");
    refused(&["--seeds", "0"], "--seeds 0");
    refused(&["--causal", "--full"], "--full");
    refused(&["--inptu", "x"], "--inptu");
}

#[test]
fn every_float_type_gives_a_table_a_csv_file_and_a_page() {
    let folder = folder("good");
    let (path, output) = (folder.join("heads.safetensors"), folder.join("report"));
    let mut tables = Vec::new();
    for dtype in [Dtype::F32, Dtype::F16, Dtype::BF16, Dtype::F64] {
        write(&path, &good(dtype));
        let [input, to] = [path.to_str().unwrap(), output.to_str().unwrap()];
        let mut arguments =
            vec!["--quick", "--kernels", "performer,dct", "--features", "8,16", "--seeds", "2"];
        arguments.extend(["--input", input, "--output", to]);
        let result = run(&arguments);
        assert!(result.status.success(), "{dtype:?}: {}", String::from_utf8_lossy(&result.stderr));
        let csv = std::fs::read_to_string(output.join("measurements.csv")).unwrap();
        // everything but the time, which is the last column but one
        let errors: Vec<String> = csv
            .lines()
            .filter(|line| line.starts_with("h,"))
            .map(|line| line.split(',').take(20).collect::<Vec<_>>().join(","))
            .collect();
        assert_eq!(errors.len(), 2 + 2 * 2 * 2, "{csv}");
        tables.push(errors);
    }
    // the numbers are exact in every type, so the errors are the same
    assert!(tables.iter().all(|table| *table == tables[0]));

    let page = std::fs::read_to_string(output.join("index.html")).unwrap();
    assert!(
        page.contains("<svg") && page.contains("uniform") && page.trim_end().ends_with("</html>")
    );
    for outside in ["src=", "@import", "<link", "url(http", "<script", "href=\"http"] {
        assert!(!page.contains(outside), "the page loads something: {outside}");
    }
    std::fs::remove_dir_all(folder).unwrap();
}

/// One head of 100 tokens, with a calibration split.
fn long_head() -> Vec<Tensor> {
    let numbers = |seed: usize| {
        (0..100 * D).map(|i| ((i * (7 + seed) + i * i * 3) % 17) as f64 / 4.0 - 2.0).collect()
    };
    let names = ["q", "k", "v", "calibration/q", "calibration/k"];
    names
        .into_iter()
        .enumerate()
        .map(|(i, name)| (name, Dtype::F32, vec![100, D], numbers(i)))
        .collect()
}

/// The lines of a CSV file that are of real heads, by the names of its columns.
fn records(path: &Path) -> Vec<HashMap<String, String>> {
    csv::Reader::from_path(path).unwrap().deserialize().map(Result::unwrap).collect()
}

fn number(record: &HashMap<String, String>, column: &str) -> f64 {
    record[column].parse().unwrap_or_else(|_| panic!("{column}: {record:?}"))
}

/// Runs the report and returns what it printed, its records and its page.
#[track_caller]
fn report(folder: &Path, arguments: &[&str]) -> (String, Vec<HashMap<String, String>>, String) {
    let output = folder.join("report");
    let result = run(&[&["--output", output.to_str().unwrap()], arguments].concat());
    assert!(result.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&result.stderr));
    let page = std::fs::read_to_string(output.join("index.html")).unwrap();
    (String::from_utf8(result.stdout).unwrap(), records(&output.join("measurements.csv")), page)
}

#[test]
fn hybrids_stand_beside_windows_of_equal_size() {
    let folder = folder("hybrids");
    let path = folder.join("heads.safetensors");
    write(&path, &long_head());
    let input = ["--quick", "--input", path.to_str().unwrap()];
    let (printed, records, page) =
        report(&folder, &[&input[..], &["--kernels", "hybrids"]].concat());

    assert!(printed.contains("Hybrids, head by head"), "{printed}");
    for label in [
        "window 8",
        "features 8",
        "taylor 4",
        "heavy 2, taylor 2",
        "ward 8, calibrated",
        "merged 8, block 4",
    ] {
        assert!(printed.contains(label), "{label}: {printed}");
    }
    assert!(printed.contains("window of equal size"), "{printed}");
    // maps were not chosen
    assert!(
        !printed.contains("growing norm")
            && records.iter().all(|record| record["kernel"] != "performer")
    );

    let (token, sinks, exact) = (2 * D, 2, 100 * 2 * D);
    let of_hybrids: Vec<_> =
        records.iter().filter(|record| !record["variant"].is_empty()).collect();
    let names = [
        "window",
        "hybrid-features",
        "hybrid-taylor",
        "hybrid-heavy",
        "hybrid-ward",
        "hybrid-merged",
    ];
    assert!(
        names.iter().all(|name| of_hybrids.iter().any(|record| record["kernel"] == *name)),
        "{records:?}"
    );
    let window = of_hybrids.iter().find(|record| record["variant"] == "window 8").unwrap();
    for record in &of_hybrids {
        let floats = number(record, "state_floats") as usize;
        assert!(floats < exact && record["failure"].is_empty(), "{record:?}");
        assert!((0.0..=1.0).contains(&number(record, "far_share")), "{record:?}");
        assert_eq!(record["dropped_error"], window["output_error"], "{record:?}");
        if record["kernel"] == "window" {
            assert_eq!(record["equal_window"], "");
            continue;
        }
        // as many floats as the hybrid, up to one token
        let equal = (number(record, "equal_window") as usize + sinks) * token;
        assert!(equal <= floats && floats < equal + token, "{record:?}");
        assert!(
            number(record, "equal_window_error") < number(window, "output_error"),
            "{record:?}"
        );
    }

    assert!(
        page.contains("Hybrids, head by head")
            && page.contains("the closest hybrid of the table is")
    );
    assert_eq!(
        page.matches("<svg viewBox=\"0 0 360 290\"").count(),
        1,
        "a plot of the head, and none of maps"
    );
    for name in names {
        assert!(page.contains(&format!("<dt>{name}</dt>")), "{name}");
    }

    // where every query sees every key, only some of them have a meaning
    let (printed, records, _) =
        report(&folder, &[&input[..], &["--kernels", "hybrids", "--full"]].concat());
    let measured = |name: &str| records.iter().any(|record| record["kernel"] == name);
    assert_eq!(names.map(measured), [false, false, true, true, true, false], "{printed}");
    assert!(records.iter().all(|record| record["equal_window"].is_empty()));

    // one by name; and none beside maps that were named
    let (_, records, _) =
        report(&folder, &[&input[..], &["--kernels", "relu,hybrid-ward"]].concat());
    let kernels: Vec<_> = records
        .iter()
        .filter(|r| r["input"] == "h")
        .map(|record| record["kernel"].clone())
        .collect();
    assert!(
        kernels.contains(&"relu".to_owned()) && kernels.contains(&"hybrid-ward".to_owned()),
        "{kernels:?}"
    );
    assert!(
        !kernels.contains(&"window".to_owned()) && !kernels.contains(&"dct".to_owned()),
        "{kernels:?}"
    );
    let (printed, records, page) = report(&folder, &[&input[..], &["--kernels", "relu"]].concat());
    assert!(!printed.contains("Hybrids") && !page.contains("Hybrids"));
    assert!(records.iter().all(|record| record["variant"].is_empty()));

    // a hybrid that is no smaller than the cache is no hybrid
    let short = |(name, dtype, _, x): Tensor| (name, dtype, vec![9, D], x[..9 * D].to_vec());
    write(&path, &long_head().into_iter().take(3).map(short).collect::<Vec<_>>());
    let (printed, ..) = report(&folder, &[&input[..], &["--kernels", "hybrids"]].concat());
    assert!(printed.contains("No hybrid was measured on 1 of 1 heads"), "{printed}");
    std::fs::remove_dir_all(folder).unwrap();
}

/// The numbers of the embedded heads are those that independent programs found for the same
/// methods.
#[test]
fn hybrids_have_the_known_errors() {
    let folder = folder("known");
    let (_, records, _) =
        report(&folder, &["--kernels", "window,hybrid-taylor,hybrid-ward,hybrid-merged"]);
    let text = include_str!("../data/reference_errors.json");
    let known: serde_json::Value = serde_json::from_str(text).unwrap();
    let mut compared = 0;
    for record in records.iter().filter(|record| !record["variant"].is_empty()) {
        let errors = &known["heads"][&record["input"]]["errors"];
        let pairs = match record["variant"].as_str() {
            "window 64" => vec![("output_error", "drop_w64_s4")],
            "ward 64" => vec![
                ("output_error", "hybrid_ward64_uncalibrated"),
                ("equal_window_error", "drop_w129_s4"),
            ],
            "ward 64, calibrated" => vec![("output_error", "hybrid_ward64")],
            "merged 64" => vec![("dropped_error", "drop_w64_s4")],
            "merged 64, Ward's cost" => vec![("output_error", "hybrid_received64_diag")],
            // its coefficients are fitted in another way where they were clamped, on L17H4
            "taylor 6" if record["input"] != "L17H4" => vec![("output_error", "hybrid_taylor2_r6")],
            _ => Vec::new(),
        };
        for (column, row) in pairs {
            let Some(expected) = errors[row].as_f64() else { continue };
            let found = number(record, column);
            assert!(
                (found / expected - 1.0).abs() < 0.01,
                "{row}: {expected}, not {column} of {record:?}"
            );
            compared += 1;
        }
    }
    assert_eq!(compared, 4 * 6 + 3 + 1 + 2);
    std::fs::remove_dir_all(folder).unwrap();
}

const RIVALS: [&str; 11] = [
    "elu",
    "relu",
    "cosformer",
    "dijiang-decay-first",
    "dijiang-decay-last",
    "retention-first",
    "retention-last",
    "retention-xpos",
    "ssd",
    "gla",
    "linformer",
];

#[test]
fn rivals_stand_in_a_section_of_their_own() {
    let folder = folder("rivals");
    let path = folder.join("heads.safetensors");
    write(&path, &long_head());
    let input = ["--quick", "--input", path.to_str().unwrap(), "--kernels"];
    let (printed, records, page) = report(&folder, &[&input[..], &["taylor,dct,rivals"]].concat());

    let title = "Rivals: kernels that models are trained with, not ranked";
    let (summary, rest) = printed.split_once("Output error on Gaussian").unwrap();
    let rivals = rest.split_once(title).unwrap().1;
    // as the first cell of a line
    let has =
        |text: &str, name: &str| text.lines().any(|line| line.starts_with(&format!("│ {name} ")));
    assert!(has(summary, "taylor *") && !has(rivals, "taylor"), "{printed}");
    for name in RIVALS {
        assert!(!has(summary, name), "{name}: {printed}");
        // the head is causal
        assert_eq!(has(rivals, name), name != "linformer", "{name}: {printed}");
        assert!(page.contains(&format!("<dt>{name}</dt>")), "{name}");
    }
    let findings = printed.rsplit_once("\n\n- ").unwrap().1;
    assert!(
        RIVALS.iter().all(|name| !findings.split_whitespace().any(|word| word == *name)),
        "{findings}"
    );
    assert!(
        page.contains(&format!("<h2>{title}</h2>")) && page.contains("<h2>Rivals by head</h2>")
    );

    for record in &records {
        let is_rival = RIVALS.contains(&record["kernel"].as_str());
        assert_eq!(record["kind"] == "rival", is_rival, "{record:?}");
        if !is_rival {
            assert_eq!(record["best_factor_error"], "", "{record:?}");
            continue;
        }
        assert!(record["failure"].is_empty(), "{record:?}");
        assert_eq!(
            record["estimates_softmax"] == "true",
            record["kernel"] == "linformer",
            "{record:?}"
        );
        // one and zero are factors too
        let of =
            |best: &str, error: &str| number(record, best) <= number(record, error).min(1.0) + 1e-6;
        assert!(of("best_factor_error", "output_error"), "{record:?}");
        assert!(of("uniform_best_factor_error", "uniform_error"), "{record:?}");
        if record["input"] == "h" {
            let floats = match record["kernel"].as_str() {
                "elu" | "relu" => 2 * D * (D + 1) + 1 + 16 * 2 * D,
                "cosformer" => 4 * D * (D + 1) + 1 + 16 * 3 * D,
                "retention-xpos" => 2 * D * (D + 1) + 2,
                _ => 2 * D * (D + 1) + 2 + 16 * 2 * D,
            };
            assert_eq!(number(record, "state_floats") as usize, floats, "{record:?}");
        }
    }

    // where every query sees every key nothing decays, and keys can be projected
    let (printed, records, _) = report(&folder, &[&input[..], &["rivals", "--full"]].concat());
    let measured = |name: &str| {
        records.iter().any(|record| record["input"] == "h" && record["kernel"] == name)
    };
    let full: Vec<_> = RIVALS.into_iter().filter(|name| measured(name)).collect();
    assert_eq!(full, ["elu", "relu", "cosformer", "linformer"], "{printed}");
    let linformer = records
        .iter()
        .find(|record| record["kernel"] == "linformer" && record["input"] == "h")
        .unwrap();
    assert_eq!(number(linformer, "state_floats") as usize, 64 * 2 * D);
    assert!(printed.contains(title) && !printed.contains("No exponential map"), "{printed}");

    // one by name
    let (_, records, page) = report(&folder, &[&input[..], &["gla"]].concat());
    assert!(
        records
            .iter()
            .all(|record| ["uniform", "softmax", "gla"].contains(&record["kernel"].as_str()))
    );
    assert!(!page.contains("Growing norms"), "the norms are of bidirectional inputs");
    let (printed, _, page) = report(&folder, &[&input[..], &["taylor"]].concat());
    assert!(!printed.contains("Rivals") && !page.contains("Rivals"));
    std::fs::remove_dir_all(folder).unwrap();
}

/// The weight of key `j` for query `t`, of queries and keys in rows of `D`.
type Weight = fn(&[f64], &[f64], usize, usize) -> f64;

fn row(x: &[f64], t: usize) -> &[f64] {
    &x[t * D..(t + 1) * D]
}

fn product(q: &[f64], k: &[f64], t: usize, j: usize) -> f64 {
    row(q, t).iter().zip(row(k, j)).map(|(q, k)| q * k).sum::<f64>() / (D as f64).sqrt()
}

fn of_features(q: &[f64], k: &[f64], t: usize, j: usize, map: impl Fn(f64) -> f64) -> f64 {
    row(q, t).iter().zip(row(k, j)).map(|(q, k)| map(*q) * map(*k)).sum()
}

/// x̂ of section "Conventions" in the crate's documentation.
fn scaled(x: f64) -> f64 {
    x / (D as f64).powf(0.25)
}

fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

/// The weighted sums of the values of one causal head.
fn outputs(weight: Weight, normalized: bool, [q, k, v]: &[Vec<f64>; 3]) -> Vec<f64> {
    let output = |t: usize| {
        let weights: Vec<f64> = (0..=t).map(|j| weight(q, k, t, j)).collect();
        let total = if normalized { weights.iter().sum() } else { 1.0 };
        (0..D).map(move |c| {
            weights.iter().enumerate().map(|(j, w)| w * v[j * D + c]).sum::<f64>() / total
        })
    };
    (0..TOKENS).flat_map(output).collect()
}

/// The kernels with no random part are those of their papers, written out.
#[test]
fn rivals_have_the_errors_of_their_formulas() {
    let folder = folder("formulas");
    let path = folder.join("heads.safetensors");
    write(&path, &good(Dtype::F64));
    let (_, records, _) =
        report(&folder, &["--quick", "--input", path.to_str().unwrap(), "--kernels", "rivals"]);

    let formulas: [(&str, bool, Weight); 7] = [
        ("elu", true, |q, k, t, j| {
            let elu = |x: f64| if x > 0.0 { x } else { x.exp() - 1.0 };
            of_features(q, k, t, j, |x| elu(scaled(x)) + 1.0)
        }),
        ("relu", true, |q, k, t, j| of_features(q, k, t, j, |x| (scaled(x)).max(0.0) + 0.001)),
        ("cosformer", true, |q, k, t, j| {
            let angle = std::f64::consts::FRAC_PI_2 * (t - j) as f64 / TOKENS as f64;
            of_features(q, k, t, j, |x| x.max(0.0) + 1e-6) * angle.cos()
        }),
        ("retention-first", false, |q, k, t, j| {
            (31.0_f64 / 32.0).powi((t - j) as i32) * product(q, k, t, j)
        }),
        ("retention-last", false, |q, k, t, j| {
            (4095.0_f64 / 4096.0).powi((t - j) as i32) * product(q, k, t, j)
        }),
        ("retention-xpos", false, |q, k, t, j| {
            let decay = |c: usize| {
                let zeta = ((c / 2 * 2) as f64 / D as f64 + 0.4) / 1.4;
                (4095.0 / 4096.0 * zeta.powf(1.0 / 512.0)).powi((t - j) as i32)
            };
            (0..D).map(|c| decay(c) * row(q, t)[c] * row(k, j)[c]).sum::<f64>() / (D as f64).sqrt()
        }),
        ("gla", false, |q, k, t, j| {
            let gates = |c: usize| {
                (j + 1..=t).map(|u| sigmoid(row(k, u)[c]).powf(1.0 / 16.0)).product::<f64>()
            };
            (0..D).map(|c| gates(c) * row(q, t)[c] * row(k, j)[c]).sum::<f64>() / (D as f64).sqrt()
        }),
    ];
    let head = [0, 1, 2].map(numbers);
    let exact = outputs(|q, k, t, j| product(q, k, t, j).exp(), true, &head);
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    let distance = |a: &[f64], factor: f64| {
        let square: f64 = a.iter().zip(&exact).map(|(a, b)| (factor * a - b).powi(2)).sum();
        (square / dot(&exact, &exact)).sqrt()
    };
    for (name, normalized, weight) in formulas {
        let output = outputs(weight, normalized, &head);
        let best = dot(&output, &exact) / dot(&output, &output);
        let record = records
            .iter()
            .find(|record| record["kernel"] == name && record["input"] == "h")
            .unwrap();
        for (column, expected) in [
            ("output_error", distance(&output, 1.0)),
            ("best_factor_error", distance(&output, best)),
        ] {
            let found = number(record, column);
            assert!(
                (found / expected - 1.0).abs() < 1e-4,
                "{name}: {column} {found}, not {expected}"
            );
        }
    }
    let uniform = outputs(|_, _, _, _| 1.0, true, &head);
    let best = dot(&uniform, &exact) / dot(&uniform, &uniform);
    let record =
        records.iter().find(|record| record["kernel"] == "elu" && record["input"] == "h").unwrap();
    assert!(
        (number(record, "uniform_best_factor_error") / distance(&uniform, best) - 1.0).abs() < 1e-4
    );
    std::fs::remove_dir_all(folder).unwrap();
}
