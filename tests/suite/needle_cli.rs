//! The needle test as a person runs it: a table in which exact softmax recalls everything,
//! findings, and a page that needs nothing else.

use crate::common::run_example;
use std::process::Output;

fn run(arguments: &[&str]) -> Output {
    run_example("needle", arguments)
}

/// The percentages in the lines of a kernel, its name and state left out.
fn percentages(table: &str, kernel: &str) -> Vec<f64> {
    let lines = table.lines().filter(|line| line.starts_with(&format!("│ {kernel} ")));
    let cells = lines
        .flat_map(|line| line.split(['│', '┆']))
        .filter_map(|cell| cell.trim().split_once('±'));
    cells.map(|(mean, _)| mean.parse().unwrap()).collect()
}

#[test]
fn a_quick_run_gives_tables_findings_and_a_page() {
    let folder = std::env::temp_dir().join(format!("dijiang-needle-{}", std::process::id()));
    let result = run(&["--quick", "--out", folder.to_str().unwrap()]);
    assert!(result.status.success(), "{}", String::from_utf8_lossy(&result.stderr));

    let printed = String::from_utf8(result.stdout).unwrap();
    let softmax = percentages(&printed, "softmax");
    assert_eq!(softmax.len(), 2 * (3 + 3), "{printed}");
    assert!(softmax.iter().all(|accuracy| *accuracy >= 90.0), "{printed}");
    // whoever looks at nothing is to find nothing: the question gives nothing away
    let uniform = percentages(&printed, "uniform");
    assert!(uniform.iter().sum::<f64>() / (uniform.len() as f64) < 20.0, "{printed}");
    // a window knows what is in it, and nothing else
    let window = percentages(&printed, "window 129");
    assert!(window[0] >= 90.0 && window[2] < 50.0, "{printed}");
    assert!(printed.contains("\n- Exact softmax gives "), "{printed}");

    let page = std::fs::read_to_string(folder.join("index.html")).unwrap();
    assert_eq!(page.matches("<figure><svg").count(), 4);
    assert!(page.contains("softmax") && page.trim_end().ends_with("</html>"));
    for outside in ["src=", "@import", "<link", "url(http", "<script", "href=\"http"] {
        assert!(!page.contains(outside), "the page loads something: {outside}");
    }
    std::fs::remove_dir_all(folder).unwrap();
}

#[test]
fn bad_options_are_refused() {
    for arguments in [["--seeds", "0"], ["--seeds", "many"], ["--quikc", "x"]] {
        let result = run(&arguments);
        let error = String::from_utf8(result.stderr).unwrap();
        assert_eq!(result.status.code(), Some(2), "{error}");
        assert!(error.contains(arguments[0]), "{error}");
    }
}
