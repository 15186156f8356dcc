//! What the pages of the repository tell a reader to do can be done: programs are compiled
//! somewhere, commands name what exists, links lead to files.

use std::path::{Path, PathBuf};
use std::{env, fs};

/// A page or a source file, its path from the root.
struct File {
    path: String,
    text: String,
}

/// The folder above that of these tests.
fn root() -> PathBuf {
    env::var_os("CARGO_MANIFEST_DIR")
        .map_or_else(|| PathBuf::from("."), |tests| PathBuf::from(tests).join(".."))
}

/// Every file below a folder with one of these endings.
fn files(folder: &str, endings: &[&str]) -> Vec<File> {
    let mut found = Vec::new();
    for entry in fs::read_dir(root().join(folder)).expect("a folder") {
        let name = entry.expect("an entry").file_name().to_string_lossy().into_owned();
        let path = if folder.is_empty() { name.clone() } else { format!("{folder}/{name}") };
        let full = root().join(&path);
        if full.is_dir() {
            if !name.starts_with('.') && name != "target" && name != "shared" {
                found.extend(files(&path, endings));
            }
        } else if endings.iter().any(|ending| name.ends_with(ending)) {
            found.push(File { path, text: fs::read_to_string(full).expect("a text file") });
        }
    }
    found
}

/// The blocks of a page: the words behind the fence, and the lines.
fn blocks(page: &File) -> Vec<(&str, String)> {
    let (mut found, mut open): (Vec<(&str, String)>, bool) = (Vec::new(), false);
    for line in page.text.lines() {
        match line.strip_prefix("```") {
            Some(_) if open => open = false,
            Some(label) => {
                open = true;
                found.push((label, String::new()));
            }
            None if open => {
                let (_, text) = found.last_mut().expect("a block");
                text.extend([line, "\n"]);
            }
            None => {}
        }
    }
    found
}

/// The page without its blocks.
fn prose(page: &File) -> String {
    page.text.split("\n```").step_by(2).flat_map(|part| [part, "\n"]).collect()
}

/// What a reader may type: lines of blocks, put together where a `\` ends them, and what stands
/// between backticks.
fn code(page: &File) -> Vec<String> {
    let blocks = blocks(page);
    let lines: Vec<String> = blocks
        .iter()
        .filter(|(label, _)| *label == "text")
        .flat_map(|(_, text)| {
            let text = text.replace("\\\n", " ");
            text.lines().map(str::to_owned).collect::<Vec<_>>()
        })
        .collect();
    let prose = prose(page);
    let inline = prose.split('`').skip(1).step_by(2).map(|code| code.replace('\n', " "));
    lines.into_iter().chain(inline).collect()
}

/// Every command of cargo in a page.
fn commands(page: &File) -> Vec<Vec<String>> {
    let lines = code(page).into_iter().filter(|line| line.starts_with("cargo "));
    lines
        .map(|line| {
            let line = line.split(" && ").next().unwrap_or_default();
            line.split_whitespace().map(str::to_owned).collect()
        })
        .collect()
}

/// The name of a manifest's package.
fn name(manifest: &File) -> &str {
    let line = manifest.text.lines().find_map(|line| line.strip_prefix("name = \""));
    line.and_then(|line| line.split('"').next()).unwrap_or_default()
}

/// What is wrong with one command.
fn complaint(command: &[String], manifests: &[File], sources: &[File]) -> Option<String> {
    let subcommands =
        ["new", "run", "test", "bench", "build", "doc", "deny", "install", "package", "fuzz"];
    let toolchain = usize::from(command.get(1)?.starts_with('+'));
    let subcommand = command.get(1 + toolchain)?.as_str();
    if !subcommands.contains(&subcommand) {
        return Some(format!("an unknown subcommand, {subcommand}"));
    }
    if ["new", "deny", "install", "package"].contains(&subcommand) {
        return None;
    }
    if subcommand == "fuzz" {
        let target = format!("fuzz_targets/{}.rs", command.last()?);
        let is_there = sources.iter().any(|source| source.path.ends_with(&target));
        return (!is_there).then(|| format!("no {target}"));
    }
    let at = command.iter().position(|word| word == "--").unwrap_or(command.len());
    let (own, handed_on) = (&command[2 + toolchain..at], command.get(at + 1..).unwrap_or_default());
    let mut folders: Vec<&str> =
        manifests.iter().map(|manifest| manifest.path.trim_end_matches("Cargo.toml")).collect();
    let mut of_target: Vec<&File> = sources.iter().collect();
    let mut filter = None;
    let mut words = own.iter().map(String::as_str);
    while let Some(word) = words.next() {
        let mut next = || words.next().unwrap_or_default();
        match word {
            "--release" | "--quiet" | "--workspace" | "--all-features" | "--no-run" | "--doc"
            | "--open" | "--no-deps" | "--lib" | "--bins" | "--tests" | "--benches" => {}
            "-p" => {
                let package = next();
                let Some(found) = manifests.iter().find(|one| name(one) == package) else {
                    return Some(format!("no package {package}"));
                };
                folders = vec![found.path.trim_end_matches("Cargo.toml")];
                of_target.retain(|source| source.path.starts_with(folders[0]));
            }
            "--features" => {
                for feature in next().split(',').filter(|feature| !feature.contains('/')) {
                    let line = format!("\n{feature} = [");
                    if !manifests.iter().any(|manifest| manifest.text.contains(&line)) {
                        return Some(format!("no feature {feature}"));
                    }
                }
            }
            "--example" | "--bench" | "--test" => {
                let target = next();
                if target.is_empty() {
                    return None; // the sentence goes on with names
                }
                let kind = format!("{}s", &word[2..]).replace("benchs", "benches");
                let begins = |path: &str, folder: &str| {
                    [format!("{folder}{kind}/{target}"), format!("{folder}{target}")]
                        .iter()
                        .filter_map(|start| path.strip_prefix(start))
                        .any(|rest| rest == ".rs" || rest.starts_with('/'))
                };
                of_target.retain(|source| folders.iter().any(|f| begins(&source.path, f)));
                if of_target.is_empty() {
                    return Some(format!("nothing for {word} {target}"));
                }
            }
            other if other.starts_with('-') => return Some(format!("an unknown option, {other}")),
            other => filter = Some(other),
        }
    }
    if subcommand == "test" {
        let known = ["--nocapture", "--ignored", "--skip", "--exact"];
        let tests = handed_on.iter().map(String::as_str).filter(|word| !known.contains(word));
        let is_test = |part: &str| {
            let of_name = |line: &str| line.trim_start().starts_with("fn ") && line.contains(part);
            let is_module = |source: &File| source.path.contains(part);
            of_target.iter().any(|s| is_module(s) || s.text.lines().any(of_name))
        };
        let missing = tests.chain(filter).find(|part| !is_test(part));
        return missing.map(|part| format!("no test {part}"));
    }
    // options stand in the source or its help, subcommands and groups of benchmarks as strings
    let is_there = |word: &str| {
        let text = if word.starts_with('-') { word.to_owned() } else { format!("\"{word}\"") };
        of_target.iter().any(|source| source.text.contains(&text))
    };
    let takes_a_word = subcommand == "bench" || own.iter().any(|word| word == "language_model");
    let first = handed_on.first().filter(|_| takes_a_word);
    let options = handed_on.iter().filter(|word| word.starts_with('-'));
    let missing = options.chain(first).find(|word| !is_there(word));
    missing.map(|word| format!("{word} does not stand in the source of what is run"))
}

#[test]
fn commands_name_what_exists() {
    let (manifests, sources) = (files("", &["Cargo.toml"]), files("", &[".rs"]));
    let (mut wrong, mut count) = (Vec::new(), 0);
    for page in files("", &[".md"]) {
        for command in commands(&page) {
            count += 1;
            if let Some(complaint) = complaint(&command, &manifests, &sources) {
                wrong.push(format!("{}: {}: {complaint}", page.path, command.join(" ")));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert!(count > 60, "only {count} commands found");
}

#[test]
fn programs_are_compiled() {
    let roots = ["src/lib.rs", "src/guide.rs", "src/theory.rs"];
    let adapters = ["adapters/candle", "adapters/burn"];
    let included = |page: &str| {
        let stem = page.trim_start_matches("docs/guide/").trim_end_matches(".md");
        roots.iter().any(|path| {
            let text = fs::read_to_string(root().join(path)).expect("a source file");
            text.contains(&format!("include_str!(\"../{page}\")"))
                || page.starts_with("docs/guide/") && text.contains(&format!("\n    {stem},\n"))
        }) || adapters.iter().any(|adapter| page == format!("{adapter}/README.md"))
    };
    let examples: Vec<File> = adapters
        .iter()
        .flat_map(|adapter| files(&format!("{adapter}/examples"), &[".rs"]))
        .collect();
    let (mut wrong, mut count) = (Vec::new(), 0);
    for page in files("", &[".md"]) {
        for (label, text) in blocks(&page) {
            count += 1;
            let right = match label {
                "rust" => included(&page.path),
                // another framework's: word for word an example of the adapter
                "rust,ignore" => examples.iter().any(|example| example.text == text),
                "text" | "toml" | "python" | "diff" => true,
                _ => false,
            };
            if !right {
                let first = text.lines().next().unwrap_or_default();
                wrong.push(format!("{}: ```{label}: {first}", page.path));
            }
        }
    }
    assert!(wrong.is_empty(), "no test compiles or knows:\n{}", wrong.join("\n"));
    assert!(count > 80, "only {count} blocks found");
}

#[test]
fn dependencies_are_those_of_this_version() {
    let manifests = files("", &["Cargo.toml"]);
    let mut wrong = Vec::new();
    for page in files("", &[".md"]) {
        for (_, text) in blocks(&page).into_iter().filter(|(label, _)| *label == "toml") {
            for line in text.lines().filter(|line| line.contains(" = ")) {
                let (key, value) = line.split_once(" = ").expect("a dependency");
                let quoted = value.split('"').nth(1).unwrap_or_default();
                let right = match quoted.strip_prefix("../dijiang") {
                    // a reader's crate beside the repository
                    Some(folder) => {
                        let path = format!("{folder}/Cargo.toml");
                        let path = path.trim_start_matches('/');
                        manifests.iter().any(|one| one.path == path && name(one) == key)
                    }
                    None => manifests.iter().flat_map(|one| one.text.lines()).any(|line| {
                        let ours = line.strip_prefix(key).and_then(|l| l.strip_prefix(" = "));
                        let version = ours.and_then(|ours| ours.split('"').nth(1));
                        version.is_some_and(|version| version.starts_with(quoted))
                    }),
                };
                if !right {
                    wrong.push(format!("{}: {line}", page.path));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn files_in_code_are_there() {
    let folders = [".ci/", ".github/", "adapters/", "benches/", "data/", "docs/", "examples/"];
    let is_ours = |word: &str| {
        let begins = |folder: &&str| word.starts_with(*folder);
        folders.iter().chain(&["src/", "tests/"]).any(begins)
    };
    let of_reader = |word: &str| word.contains("NAME") || word == "src/main.rs";
    let (mut wrong, mut count) = (Vec::new(), 0);
    for page in files("", &[".md"]) {
        let folder = Path::new(&page.path).parent().expect("a folder");
        for line in code(&page) {
            for word in line.split_whitespace().map(|word| word.trim_end_matches([',', ';'])) {
                if is_ours(word) && !of_reader(word) {
                    count += 1;
                    if !root().join(word).exists() && !root().join(folder).join(word).exists() {
                        wrong.push(format!("{}: {word}", page.path));
                    }
                }
            }
        }
    }
    assert!(wrong.is_empty(), "no such files:\n{}", wrong.join("\n"));
    assert!(count > 50, "only {count} files found");
}

/// The anchor that a heading gets.
fn anchor(heading: &str) -> String {
    let text = heading.trim_start_matches('#').trim().to_lowercase();
    let kept = text.chars().filter(|c| c.is_alphanumeric() || " -_".contains(*c));
    kept.map(|c| if c == ' ' { '-' } else { c }).collect()
}

#[test]
fn links_lead_somewhere() {
    let pages = files("", &[".md"]);
    let (mut wrong, mut count) = (Vec::new(), 0);
    for page in &pages {
        let prose = prose(page);
        let inline = prose.split("](").skip(1).filter_map(|rest| rest.split(')').next());
        let labelled = prose.lines().filter_map(|line| {
            line.strip_prefix('[').and_then(|line| line.split_once("]: ")).map(|(_, to)| to)
        });
        let is_file = |link: &&str| !link.contains("://") && !link.contains("::");
        for link in inline.chain(labelled).filter(is_file) {
            count += 1;
            let (path, heading) = link.split_once('#').unwrap_or((link, ""));
            let folder = Path::new(&page.path).parent().expect("a folder");
            let target = match path {
                "" => root().join(&page.path),
                path => root().join(folder).join(path),
            };
            let has_heading = || {
                let text = fs::read_to_string(&target).unwrap_or_default();
                text.lines().any(|line| line.starts_with('#') && anchor(line) == heading)
            };
            if !target.exists() || !heading.is_empty() && !has_heading() {
                wrong.push(format!("{}: {link}", page.path));
            }
        }
    }
    assert!(wrong.is_empty(), "links to nothing:\n{}", wrong.join("\n"));
    assert!(count > 100, "only {count} links found");
}

#[test]
fn promises_name_tests_that_exist() {
    let pages = files("docs", &["reliability.md"]);
    let tests = files("tests", &[".rs"]);
    let is_name = |code: &String| code.chars().all(|c| c.is_ascii_lowercase() || "_:".contains(c));
    let spans = pages.iter().flat_map(code).filter(is_name);
    // a test of the suite with its module, or a long name of another file
    let names: Vec<String> =
        spans.filter(|code| code.contains("::") || code.matches('_').count() > 3).collect();
    assert!(names.len() > 20, "{names:?}");
    for name in names {
        let (module, test) = name.rsplit_once("::").unwrap_or(("", &name));
        let is_there = tests
            .iter()
            .any(|file| file.path.contains(module) && file.text.contains(&format!("fn {test}(")));
        assert!(is_there, "docs/reliability.md: there is no test `{name}`");
    }
}
