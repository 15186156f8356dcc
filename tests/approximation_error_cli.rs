//! The report as a person runs it: bad input gives one clear sentence and exit code 2, good input a table, a CSV file and
//! a page that needs nothing else.

use half::{bf16, f16};
use safetensors::tensor::{Dtype, TensorView, serialize};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

fn folder(name: &str) -> PathBuf {
    let path = std::env::temp_dir().join(format!("dijiang-{name}-{}", std::process::id()));
    std::fs::create_dir_all(&path).unwrap();
    path
}

fn run(arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO"));
    command.args(["run", "--quiet", "--example", "approximation_error", "--"]).args(arguments);
    command.current_dir(env!("CARGO_MANIFEST_DIR")).output().unwrap()
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

/// A file with the tensors `h/<name>`.
fn write(path: &Path, tensors: &[(&str, Dtype, Vec<usize>, Vec<f64>)]) {
    let data: Vec<Vec<u8>> = tensors.iter().map(|(_, dtype, _, x)| bytes(*dtype, x)).collect();
    let views = tensors.iter().zip(&data).map(|((name, dtype, shape, _), data)| {
        (format!("h/{name}"), TensorView::new(*dtype, shape.clone(), data).unwrap())
    });
    std::fs::write(path, serialize(views, None).unwrap()).unwrap();
}

fn good(dtype: Dtype) -> Vec<(&'static str, Dtype, Vec<usize>, Vec<f64>)> {
    ["q", "k", "v"].into_iter().enumerate().map(|(i, name)| (name, dtype, vec![TOKENS, D], numbers(i))).collect()
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
    refused_file("not a whole safetensors file");
    write(&path, &good(Dtype::F32));
    let whole = std::fs::read(&path).unwrap();
    std::fs::write(&path, &whole[..whole.len() - 5]).unwrap();
    refused_file("not a whole safetensors file");
    write(&path, &good(Dtype::F32)[..2]);
    refused_file("`h/v` is missing");
    write(&path, &[("weights", Dtype::F32, vec![TOKENS, D], numbers(0))]);
    refused_file("holds no head");
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
    std::fs::remove_dir_all(folder).unwrap();
}

#[test]
fn bad_options_get_one_sentence() {
    refused(&["--kernels", "performer,performr"], "performr");
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
        let mut arguments = vec!["--quick", "--kernels", "performer,dct", "--features", "8,16", "--seeds", "2"];
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
    assert!(page.contains("<svg") && page.contains("uniform") && page.trim_end().ends_with("</html>"));
    for outside in ["src=", "@import", "<link", "url(http", "<script", "href=\"http"] {
        assert!(!page.contains(outside), "the page loads something: {outside}");
    }
    std::fs::remove_dir_all(folder).unwrap();
}
