//! The rules of the source tree: imports go downward, `unsafe` stays in `kernel`, files stay short.

use std::fs;
use std::path::{Path, PathBuf};

/// The rooms from the bottom up. Those in one row do not import one another.
const ORDER: &[&[&str]] = &[
    &["outcome", "fault", "phases"],
    &["record"],
    &["kernel"],
    &["freeze"],
    &["memory", "task", "objects", "filesystem"],
    &["checkpoint"],
    &["rollback"],
    &["image"],
    &["restore"],
    &["engine"],
    &["container"],
    &["keeper"],
    &["cli"],
];

/// The one module that lies lower than its room: `record` builds its buffer chain on it.
const LEAF: &str = "kernel::memory_file";

/// Lines in a source file, tests included.
const LONGEST: usize = 700;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("src")
}

/// Every Rust file below `src`, as its path from there.
fn sources() -> Vec<(PathBuf, String)> {
    let mut found = Vec::new();
    let mut pending = vec![root()];
    while let Some(directory) = pending.pop() {
        for entry in fs::read_dir(directory).expect("listing a source directory") {
            let path = entry.expect("reading a directory entry").path();
            if path.is_dir() {
                pending.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let text = fs::read_to_string(&path).expect("reading a source file");
                let name = path.strip_prefix(root()).expect("a path below src");
                found.push((name.to_owned(), text));
            }
        }
    }
    found.sort();
    found
}

/// The text without line comments.
fn code(text: &str) -> String {
    let without = |line: &str| line.find("//").map_or(line, |at| &line[..at]).to_owned();
    text.lines().map(without).collect::<Vec<_>>().join("\n")
}

/// The room of a file: the first part of its path. `lib.rs` and `main.rs` belong to none.
fn room(file: &Path) -> Option<String> {
    let first = file.components().next()?;
    let name = Path::new(first.as_os_str())
        .file_stem()?
        .to_str()?
        .to_owned();
    (name != "lib" && name != "main").then_some(name)
}

fn level(room: &str) -> Option<usize> {
    ORDER.iter().position(|row| row.contains(&room))
}

fn is_word(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

/// The paths that follow `crate::`, two steps deep, groups taken apart.
fn imports(code: &str) -> Vec<String> {
    let mut paths = Vec::new();
    for (at, _) in code.match_indices("crate::") {
        if code[..at].ends_with(is_word) {
            continue;
        }
        let rest = &code[at + "crate::".len()..];
        match rest.strip_prefix('{') {
            None => paths.push(two_steps(rest)),
            Some(group) => paths.extend(members(group).into_iter().map(two_steps)),
        }
    }
    paths
}

/// `kernel::pidfd::open()` becomes `kernel::pidfd`.
fn two_steps(path: &str) -> String {
    let end = path
        .find(|c: char| !is_word(c) && c != ':')
        .unwrap_or(path.len());
    path[..end]
        .trim_end_matches(':')
        .split("::")
        .take(2)
        .collect::<Vec<_>>()
        .join("::")
}

/// What stands between the commas of a group, up to its closing brace.
fn members(group: &str) -> Vec<&str> {
    let (mut depth, mut start, mut found) = (0, 0, Vec::new());
    for (at, c) in group.char_indices() {
        match c {
            '{' => depth += 1,
            '}' if depth > 0 => depth -= 1,
            ',' | '}' if depth == 0 => {
                found.push(group[start..at].trim());
                start = at + 1;
                if c == '}' {
                    break;
                }
            }
            _ => {}
        }
    }
    found.retain(|member| !member.is_empty());
    found
}

/// Why a file in `room` may not import `path`.
fn objection(room: &str, path: &str) -> Option<String> {
    let target = path.split("::").next().unwrap_or(path);
    if target == room || path == LEAF {
        return None;
    }
    let Some(from) = level(room) else {
        return Some(format!("room {room} is not in the order: add it"));
    };
    match level(target) {
        Some(to) if to < from => None,
        Some(to) if to == from => Some(format!("{room} and {target} do not import one another")),
        Some(_) => Some(format!("{target} lies above {room}")),
        None => Some(format!("{target} is no room in the order")),
    }
}

#[test]
fn imports_go_downward() {
    let mut wrong = Vec::new();
    for (file, text) in sources() {
        let Some(room) = room(&file) else { continue };
        for path in imports(&code(&text)) {
            if let Some(why) = objection(&room, &path) {
                wrong.push(format!("{}: crate::{path}: {why}", file.display()));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn nothing_reaches_out_of_its_room_by_super() {
    let mut wrong = Vec::new();
    for (file, text) in sources() {
        let inner = code(&text);
        // From `room/file.rs` one `super` is the room and two are the crate; each directory below allows one more.
        let depth = file.components().count();
        if inner.contains(&"super::".repeat(depth.max(2))) {
            wrong.push(file.display().to_string());
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn the_leaf_below_record_imports_nothing() {
    let leaf = root().join("kernel/memory_file.rs");
    let text = fs::read_to_string(leaf).expect("reading the leaf");
    assert_eq!(imports(&code(&text)), Vec::<String>::new());
}

#[test]
fn unsafe_stays_in_kernel() {
    let mut wrong = Vec::new();
    for (file, text) in sources() {
        let in_kernel = room(&file).as_deref() == Some("kernel");
        let code = code(&text);
        let says = |word: &str| code.split(|c| !is_word(c)).any(|found| found == word);
        if !in_kernel && (says("unsafe") || says("unsafe_code")) {
            wrong.push(file.display().to_string());
        }
    }
    assert!(
        wrong.is_empty(),
        "unsafe outside kernel: {}",
        wrong.join(", ")
    );
}

#[test]
fn files_are_short() {
    let mut wrong = Vec::new();
    for (file, text) in sources() {
        let lines = text.lines().count();
        if lines > LONGEST {
            wrong.push(format!("{}: {lines} lines", file.display()));
        }
    }
    assert!(
        wrong.is_empty(),
        "over {LONGEST} lines: {}",
        wrong.join(", ")
    );
}

#[test]
fn the_check_sees_what_it_looks_for() {
    let text = "use crate::{kernel::{pidfd, kcmp}, record::Kind};\nfn f() { crate::cli::run() } // crate::keeper\n";
    assert_eq!(imports(&code(text)), ["kernel", "record::Kind", "cli::run"]);
    assert!(objection("task", "kernel::pidfd").is_none());
    assert!(objection("task", "memory::Vma").is_some());
    assert!(objection("record", "kernel::pidfd").is_some());
    assert!(objection("record", LEAF).is_none());
    assert!(objection("kernel", "cli").is_some());
    assert!(objection("kernel", "unheard_of").is_some());
}
