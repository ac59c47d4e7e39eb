//! What all benches share: the target program, medians, tables, straight lines.

#![allow(
    dead_code,
    reason = "each bench is a program of its own and uses a part of this"
)]

pub(crate) mod container;

use std::fmt::Write as _;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::Instant;

use snapback::engine::{Engine, RollbackOptions, Target as Root};
use snapback::outcome::Report;

/// The name under which benches take their checkpoints.
pub(crate) const NAME: &str = "bench";

/// Compiles `benches/target.c` and returns the program's path.
pub(crate) fn compile() -> PathBuf {
    let program = Path::new(env!("CARGO_TARGET_TMPDIR")).join("target");
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/target.c");
    let compiled = Command::new("cc")
        .args(["-O2", "-Wall", "-pthread", "-o"])
        .args([&program, &source])
        .status()
        .expect("running cc");
    assert!(compiled.success(), "benches/target.c does not compile");
    program
}

/// The shape of a process tree.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Shape {
    /// Resident memory of the root in MiB, and of its children by copy-on-write.
    pub(crate) mib: usize,
    /// Processes in all.
    pub(crate) processes: usize,
    /// Threads of the root.
    pub(crate) threads: usize,
    /// Descriptors of the root.
    pub(crate) descriptors: usize,
    /// Mappings of the root besides those of any program.
    pub(crate) vmas: usize,
}

impl Shape {
    /// One thread, few descriptors, few mappings.
    pub(crate) fn plain(mib: usize) -> Shape {
        Shape {
            mib,
            processes: 1,
            threads: 1,
            descriptors: 3,
            vmas: 0,
        }
    }
}

/// A running target program, killed when dropped.
pub(crate) struct Program {
    child: Child,
    commands: ChildStdin,
    answers: BufReader<ChildStdout>,
}

impl Program {
    /// Starts it and waits until it is ready.
    pub(crate) fn start(program: &Path, arguments: &[String]) -> Program {
        Program::launch(Command::new(program).args(arguments))
    }

    fn launch(command: &mut Command) -> Program {
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            // Ours may be a file, whose offset a rollback would take back under what we have printed.
            .stderr(Stdio::null())
            .spawn()
            .expect("starting the target");
        let commands = child.stdin.take().expect("a pipe");
        let answers = BufReader::new(child.stdout.take().expect("a pipe"));
        let mut program = Program {
            child,
            commands,
            answers,
        };
        assert_eq!(program.line(), "READY");
        program
    }

    /// Starts a tree of this shape.
    pub(crate) fn tree(program: &Path, shape: Shape) -> Program {
        Program::tree_of(program, shape, false)
    }

    /// Starts a tree of this shape, whose children have written to all their memory if it is to be their own.
    pub(crate) fn tree_of(program: &Path, shape: Shape, own: bool) -> Program {
        let Shape {
            mib,
            processes,
            threads,
            descriptors,
            vmas,
        } = shape;
        let numbers = [mib, processes, threads, descriptors, vmas].map(|number| number.to_string());
        let mut command = Command::new(program);
        if own {
            command.env("TARGET_OWN_MEMORY", "1");
        }
        Program::launch(command.arg("run").args(numbers))
    }

    /// Gives a command and returns the microseconds it answers with.
    pub(crate) fn ask(&mut self, command: &str) -> f64 {
        self.commands
            .write_all(format!("{command}\n").as_bytes())
            .expect("the target is gone");
        self.line().parse().expect("a number")
    }

    /// Its PID.
    pub(crate) fn pid(&self) -> i32 {
        self.child.id() as i32
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        self.answers
            .read_line(&mut line)
            .expect("the target is gone");
        line.trim_end().to_owned()
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Attaches to a program and takes the first checkpoint.
pub(crate) fn checkpoint(program: &Program) -> (Engine, Report) {
    let root = Root {
        pid: program.pid(),
        cgroup: None,
        label: "bench".to_owned(),
        outlives: false,
    };
    let mut engine = Engine::attach(root).expect("attaching to the target");
    let report = engine.take(NAME).expect("checkpoint");
    (engine, report)
}

/// Rolls back and returns the microseconds it took as the caller sees it.
pub(crate) fn rollback(engine: &mut Engine) -> (f64, Report) {
    let began = Instant::now();
    let report = engine
        .rollback(NAME, RollbackOptions { verify: false })
        .expect("rollback");
    (began.elapsed().as_secs_f64() * 1e6, report)
}

/// The median of `rounds` measurements after `warm_up` that do not count.
pub(crate) fn median(warm_up: usize, rounds: usize, mut measure: impl FnMut() -> f64) -> f64 {
    for _ in 0..warm_up {
        measure();
    }
    middle((0..rounds).map(|_| measure()).collect())
}

/// The middle one.
pub(crate) fn middle(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// Prints a table in Markdown, its numbers to the right.
pub(crate) fn table(title: &str, header: &[&str], rows: &[Vec<String>]) {
    let mut text = format!("\n### {title}\n\n");
    let all = || {
        std::iter::once(header.iter().map(|cell| (*cell).to_owned()).collect())
            .chain(rows.iter().cloned())
    };
    let width = |column: usize| {
        all()
            .map(|row: Vec<String>| row[column].chars().count())
            .max()
            .unwrap_or(3)
            .max(3)
    };
    for (index, row) in all().enumerate() {
        for (column, cell) in row.iter().enumerate() {
            let _ = write!(text, "| {cell:>width$} ", width = width(column));
        }
        text.push_str("|\n");
        if index == 0 {
            for column in 0..header.len() {
                let _ = write!(text, "|{:->width$}:", "", width = width(column) + 1);
            }
            text.push_str("|\n");
        }
    }
    println!("{text}");
}

/// The straight line through points with the least relative error (weights 1/y, so that small values count too):
/// its value at 0 and its slope.
pub(crate) fn line(points: &[(f64, f64)]) -> (f64, f64) {
    let sum =
        |of: fn(f64, f64) -> f64| -> f64 { points.iter().map(|(x, y)| of(*x, *y) / (y * y)).sum() };
    let (one, x, y, xx, xy) = (
        sum(|_, _| 1.0),
        sum(|x, _| x),
        sum(|_, y| y),
        sum(|x, _| x * x),
        sum(|x, y| x * y),
    );
    let slope = (one * xy - x * y) / (one * xx - x * x);
    ((y - slope * x) / one, slope)
}

/// How far the points are from that line at most, as a share of their value.
pub(crate) fn misfit(points: &[(f64, f64)], (start, slope): (f64, f64)) -> f64 {
    points
        .iter()
        .map(|(x, y)| ((start + slope * x - y) / y).abs())
        .fold(0.0, f64::max)
}

/// Milliseconds from microseconds.
pub(crate) fn ms(microseconds: f64) -> String {
    format!("{:.3}", microseconds / 1000.0)
}

/// A ratio, with what it must not exceed.
pub(crate) fn judged(ratio: f64, limit: f64) -> String {
    format!(
        "{ratio:.2} (at most {limit}: {})",
        if ratio <= limit { "kept" } else { "MISSED" }
    )
}
