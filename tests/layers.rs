//! The plan of the house holds: files import only what stands below them, and stay readable.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::{env, fs};

/// The floors from the bottom, each a list of modules with all that is in them. A longer name goes
/// before a shorter one.
const FLOORS: &[&[&str]] = &[
    &["error", "mask"],
    &["kernel::simd", "kernel::buffer"],
    &["kernel::loops"],
    &["kernel::compiled"],
    &["kernel"],
    &["scalar"],
    &["check", "parameters", "state_format", "views"],
    &["projection", "rotary", "calibration"],
    &["features"],
    &["memory"],
    &["attention"],
    &["multi_head"],
    &["selection", "fidelity", "distill"],
    &["plan"],
    &["block", "decay", "bench", "guide", "theory"],
];

/// The longest that a file may be, outside of `kernel/loops`.
const MOST_LINES: usize = 400;

/// Columns of code, comments and prose.
const MOST_COLUMNS: usize = 100;

/// The folder above that of these tests.
fn root() -> PathBuf {
    env::var_os("CARGO_MANIFEST_DIR")
        .map_or_else(|| PathBuf::from("."), |tests| PathBuf::from(tests).join(".."))
}

/// Every file below a folder with one of these endings.
fn files(folder: &Path, endings: &[&str], found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).expect("a folder") {
        let path = entry.expect("an entry").path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if path.is_dir() {
            if !name.starts_with('.') && name != "target" {
                files(&path, endings, found);
            }
        } else if endings.iter().any(|ending| name.ends_with(ending)) {
            found.push(path);
        }
    }
}

/// The source files but for the root, by module.
fn modules() -> BTreeMap<String, String> {
    let (root, mut paths) = (root().join("src"), Vec::new());
    files(&root, &[".rs"], &mut paths);
    let module = |path: PathBuf| {
        let name = path.strip_prefix(&root).expect("in src").with_extension("");
        let parts: Vec<_> = name.iter().map(|part| part.to_string_lossy()).collect();
        (parts.join("::"), fs::read_to_string(path).expect("a source file"))
    };
    paths.into_iter().map(module).filter(|(name, _)| name != "lib").collect()
}

/// What braces stand for: `a::{b, c::{d}}` gives `a::b` and `a::c::d`.
fn expanded(path: &str) -> Vec<String> {
    let Some((before, rest)) = path.split_once('{') else { return vec![path.trim().to_owned()] };
    let (mut depth, mut parts, mut part) = (0, Vec::new(), String::new());
    for c in rest.chars() {
        match c {
            '}' if depth == 0 => break,
            ',' if depth == 0 => parts.push(std::mem::take(&mut part)),
            _ => {
                depth += i32::from(c == '{') - i32::from(c == '}');
                part.push(c);
            }
        }
    }
    parts.push(part);
    let parts = parts.iter().filter(|part| !part.trim().is_empty());
    parts.flat_map(|part| expanded(&format!("{}{}", before.trim(), part.trim()))).collect()
}

/// The modules whose items a file names, its own tests aside.
fn imports(module: &str, text: &str, all: &BTreeMap<String, String>) -> Vec<String> {
    let code: String = text
        .split("\n#[cfg(test)]\n")
        .next()
        .unwrap_or_default()
        .lines()
        .map(|line| line.split("//").next().unwrap_or_default())
        .flat_map(|line| [line, "\n"])
        .collect();
    let parent = module.rsplit_once("::").map_or("", |(parent, _)| parent);
    let code =
        code.replace("super::", &format!("crate::{parent}::")).replace("crate::::", "crate::");
    let mut found = Vec::new();
    for (at, _) in code.match_indices("crate::") {
        let path = &code[at + "crate::".len()..];
        let simple = path.find(|c: char| !(c.is_alphanumeric() || "_:".contains(c)));
        let end = match simple {
            Some(end) if path[end..].starts_with('{') => path.find(';').unwrap_or(path.len()),
            Some(end) => end,
            None => path.len(),
        };
        for path in expanded(&path[..end]) {
            // the longest part of the path that is a file
            let mut name = path.as_str();
            while !all.contains_key(name) && !name.is_empty() {
                name = name.rsplit_once("::").map_or("", |(before, _)| before);
            }
            // what the root exports has a file of its own, which is to be named
            found.push(if name.is_empty() { format!("lib ({path})") } else { name.to_owned() });
        }
    }
    found.retain(|import| import != module);
    found.sort();
    found.dedup();
    found
}

fn floor(module: &str) -> usize {
    let is_in = |part: &&str| module == *part || module.starts_with(&format!("{part}::"));
    FLOORS
        .iter()
        .position(|floor| floor.iter().any(is_in))
        .unwrap_or_else(|| panic!("{module} stands on no floor: add it to FLOORS"))
}

#[test]
fn files_import_only_what_stands_below_them() {
    let (all, mut wrong) = (modules(), Vec::new());
    for (module, text) in &all {
        for import in imports(module, text, &all) {
            if import.starts_with("lib") || floor(&import) > floor(module) {
                wrong.push(format!("{module} imports {import}"));
            }
        }
    }
    assert!(wrong.is_empty(), "imports of higher floors:\n{}", wrong.join("\n"));
}

#[test]
fn no_files_import_each_other_in_a_circle() {
    fn visit(
        module: &str,
        all: &BTreeMap<String, String>,
        path: &mut Vec<String>,
        done: &mut Vec<String>,
    ) {
        if done.iter().any(|other| other == module) {
            return;
        }
        if let Some(start) = path.iter().position(|other| other == module) {
            panic!("a circle of imports: {} -> {module}", path[start..].join(" -> "));
        }
        path.push(module.to_owned());
        for import in imports(module, &all[module], all) {
            if all.contains_key(&import) {
                visit(&import, all, path, done);
            }
        }
        done.extend(path.pop());
    }
    let (all, mut done) = (modules(), Vec::new());
    all.keys().for_each(|module| visit(module, &all, &mut Vec::new(), &mut done));
}

#[test]
fn only_the_root_exports_what_others_define() {
    for (module, text) in modules() {
        let again = text.lines().find(|line| {
            let line = line.trim_start();
            line.starts_with("pub use") || line.starts_with("pub(") && line.contains(") use ")
        });
        let is_macro = |line: &str| text.contains("macro_rules!") && !line.contains("::");
        assert!(
            again.is_none_or(is_macro),
            "{module} exports again: {}",
            again.unwrap_or_default()
        );
    }
}

#[test]
fn source_files_are_short() {
    for (module, text) in modules() {
        let lines = text.lines().count();
        let is_loops = module.starts_with("kernel::loops");
        assert!(is_loops || lines <= MOST_LINES, "{module} has {lines} lines: split it by ideas");
    }
}

#[test]
fn lines_are_short() {
    let mut paths = Vec::new();
    files(&root(), &[".rs", ".md"], &mut paths);
    let mut long = Vec::new();
    for path in paths {
        let text = fs::read_to_string(&path).expect("a text file");
        for (i, line) in text.lines().enumerate() {
            let prose = line.trim_start().trim_start_matches(['/', '!']).trim_start();
            // marks above letters, as in x̂, have no column of their own
            let columns = line.chars().filter(|c| !('\u{300}'..='\u{36f}').contains(c)).count();
            if columns > MOST_COLUMNS && !prose.starts_with('|') {
                long.push(format!("{}:{}", path.display(), i + 1));
            }
        }
    }
    assert!(long.is_empty(), "lines of over {MOST_COLUMNS} columns:\n{}", long.join("\n"));
}
