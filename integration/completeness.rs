//! No test file and no fixture program is forgotten.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use crate::support::fixture;

fn directory(name: &str) -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(name)
}

/// Stems of the files with this extension.
fn stems(directory: &Path, extension: &str) -> BTreeSet<String> {
    fs::read_dir(directory)
        .expect("listing a source directory")
        .map(|entry| entry.expect("reading a directory entry").path())
        .filter(|path| path.extension().is_some_and(|found| found == extension))
        .map(|path| {
            path.file_stem()
                .expect("a named file")
                .to_string_lossy()
                .into_owned()
        })
        .collect()
}

fn words(text: &str) -> BTreeSet<&str> {
    text.split(|c: char| !(c.is_alphanumeric() || c == '_'))
        .collect()
}

#[test]
fn every_test_file_is_a_module() {
    let main =
        fs::read_to_string(directory("integration").join("main.rs")).expect("reading main.rs");
    let modules: BTreeSet<String> = main
        .lines()
        .filter_map(|line| line.strip_prefix("mod ")?.strip_suffix(';'))
        .map(str::to_owned)
        .collect();
    let mut files = stems(&directory("integration"), "rs");
    files.remove("main");
    files.insert("support".to_owned());
    assert_eq!(
        modules, files,
        "left: modules of main.rs, right: files of integration/"
    );
}

#[test]
fn every_fixture_program_is_tested() {
    let mut tests = String::new();
    for stem in stems(&directory("integration"), "rs") {
        let path = directory("integration").join(stem + ".rs");
        tests.push_str(&fs::read_to_string(path).expect("reading a test file"));
    }
    let named = words(&tests);
    for program in stems(&directory("fixtures/programs"), "c") {
        assert!(
            named.contains(program.as_str()),
            "no test names fixtures/programs/{program}.c"
        );
    }
}

/// The words between backticks in the last column of the tables of `docs/coverage.md` and `docs/coverage-descriptors.md`.
fn covered() -> BTreeSet<String> {
    let page = |name: &str| {
        fs::read_to_string(directory("docs").join(name)).expect("reading a page of docs/")
    };
    let text = page("coverage.md") + &page("coverage-descriptors.md");
    text.lines()
        .filter_map(|line| line.strip_suffix('|')?.rsplit_once('|'))
        .flat_map(|(_, column)| column.split('`').skip(1).step_by(2))
        .map(str::to_owned)
        .collect()
}

#[test]
fn the_coverage_page_names_every_fixture_program_and_no_other() {
    let programs = stems(&directory("fixtures/programs"), "c");
    let covered = covered();
    let missing: Vec<_> = programs.difference(&covered).collect();
    let unknown: Vec<_> = covered.difference(&programs).collect();
    assert!(
        missing.is_empty() && unknown.is_empty(),
        "docs/coverage*.md do not name {missing:?}, and there is no {unknown:?}"
    );
}

#[test]
fn every_fixture_program_builds() {
    let build = fixture::build_directory();
    for program in stems(&directory("fixtures/programs"), "c") {
        assert!(build.join(&program).is_file(), "{program} was not built");
    }
}
