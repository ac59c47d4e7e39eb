//! The `snapback` command with a root directory of its own.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use super::{numbers, wait};

/// Exit status of an operation that was done.
pub(crate) const DONE: i32 = 0;
/// Exit status of an error.
pub(crate) const ERROR: i32 = 1;
/// Exit status of wrong usage.
pub(crate) const USAGE: i32 = 2;
/// Exit status of a refusal: nothing was touched.
pub(crate) const REFUSED: i32 = 3;
/// Exit status of a rollback that failed half-way: the tree was killed.
pub(crate) const LOST: i32 = 4;

/// What one call of the command gave.
#[derive(Debug)]
pub(crate) struct Answer {
    /// Exit status; 128 + signal if it was killed.
    pub(crate) status: i32,
    /// Standard output.
    pub(crate) out: String,
    /// Standard error.
    pub(crate) err: String,
    /// The one object printed under `--json`; `Null` if standard output is not one.
    pub(crate) report: Value,
}

impl Answer {
    /// Fails the test unless the command ended with this status.
    #[track_caller]
    pub(crate) fn expect(self, status: i32, what: &str) -> Self {
        assert_eq!(self.status, status, "exit status of {what}: {self:#?}");
        self
    }

    /// A number of the report.
    #[track_caller]
    pub(crate) fn number(&self, field: &str) -> u64 {
        self.report[field]
            .as_u64()
            .unwrap_or_else(|| panic!("no number {field} in the report: {self:#?}"))
    }

    /// A text of the report, as `outcome`.
    #[track_caller]
    pub(crate) fn text(&self, field: &str) -> &str {
        self.report[field]
            .as_str()
            .unwrap_or_else(|| panic!("no text {field} in the report: {self:#?}"))
    }
}

/// A root directory, and all keepers that were started below it. Dropping it releases what was taken and ends the
/// keepers.
#[derive(Debug)]
pub(crate) struct Session {
    directory: tempfile::TempDir,
    environment: BTreeMap<OsString, OsString>,
    targets: Vec<String>,
}

impl Session {
    /// A fresh root directory.
    pub(crate) fn new() -> Self {
        let directory = tempfile::Builder::new()
            .prefix("snapback-test-")
            .tempdir()
            .expect("making a directory");
        Self {
            directory,
            environment: BTreeMap::new(),
            targets: Vec::new(),
        }
    }

    /// Sets an environment variable of the commands from now on (and of a keeper they start).
    pub(crate) fn set(&mut self, name: &str, value: &str) -> &mut Self {
        self.environment.insert(name.into(), value.into());
        self
    }

    /// Takes it back.
    pub(crate) fn unset(&mut self, name: &str) -> &mut Self {
        self.environment.remove(&OsString::from(name));
        self
    }

    /// The root directory.
    pub(crate) fn root(&self) -> PathBuf {
        self.directory.path().join("root")
    }

    /// Room for files of the test, gone with the session.
    pub(crate) fn scratch(&self) -> &Path {
        self.directory.path()
    }

    /// The command with `--root` set, for what the methods below don't do.
    pub(crate) fn command(&self) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_snapback"));
        command
            .arg("--root")
            .arg(self.root())
            .envs(&self.environment)
            .stdin(Stdio::null());
        command
    }

    /// Runs `snapback --root ROOT ARGUMENTS…` to its end.
    #[track_caller]
    pub(crate) fn run(&self, arguments: &[&str]) -> Answer {
        let mut command = self.command();
        command.args(arguments);
        finish(command)
    }

    /// Whether `snapback check` finds this.
    pub(crate) fn has(&self, feature: &str) -> bool {
        let found = |line: &str| line.starts_with("present") && line.contains(feature);
        self.run(&["check"]).out.lines().any(found)
    }

    /// `checkpoint --pid`; keeps in mind that there is something to release.
    #[track_caller]
    pub(crate) fn try_checkpoint(&mut self, pid: i32) -> Answer {
        self.will_release(pid);
        self.run(&["checkpoint", "--json", "--pid", &pid.to_string()])
    }

    /// Keeps in mind that there may be checkpoints of this process to release.
    pub(crate) fn will_release(&mut self, pid: i32) {
        self.targets.push(pid.to_string());
    }

    /// `checkpoint --pid`, which must be done.
    #[track_caller]
    pub(crate) fn checkpoint(&mut self, pid: i32) -> Answer {
        let answer = self.try_checkpoint(pid).expect(DONE, "checkpoint");
        assert_eq!(answer.text("outcome"), "checkpointed", "{answer:#?}");
        answer
    }

    /// `rollback --verify --pid`, whatever comes of it.
    #[track_caller]
    pub(crate) fn try_rollback(&self, pid: i32) -> Answer {
        self.run(&["rollback", "--verify", "--json", "--pid", &pid.to_string()])
    }

    /// `rollback --verify --pid`, which must be done.
    #[track_caller]
    pub(crate) fn rollback(&self, pid: i32) -> Answer {
        let answer = self.try_rollback(pid).expect(DONE, "rollback");
        assert_eq!(answer.text("outcome"), "rolled_back", "{answer:#?}");
        answer
    }

    /// `release --all --pid`.
    #[track_caller]
    pub(crate) fn release(&self, pid: i32) -> Answer {
        self.run(&["release", "--all", "--pid", &pid.to_string()])
    }

    /// Keepers (and other commands of ours) that still run on this root.
    pub(crate) fn keepers(&self) -> Vec<i32> {
        numbers::with_argument(&self.root().to_string_lossy())
            .into_iter()
            .filter(|pid| numbers::is_alive(*pid))
            .collect()
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        for pid in std::mem::take(&mut self.targets) {
            if !self.keepers().is_empty() {
                // Best effort: the tree may be dead, released or never taken. What counts comes next.
                let mut command = self.command();
                command
                    .args(["release", "--all", "--pid", &pid])
                    .stdout(Stdio::null())
                    .stderr(Stdio::null());
                let _ = command.status();
            }
        }
        let left = !wait::within(Duration::from_secs(5), || self.keepers().is_empty());
        if left {
            let keepers = self.keepers();
            for pid in &keepers {
                let _ = kill(Pid::from_raw(*pid), Signal::SIGKILL);
            }
            assert!(
                std::thread::panicking(),
                "keepers outlived the last release: {keepers:?}"
            );
        }
    }
}

/// Reads a stream to its end on a thread of its own.
fn drain(mut stream: impl Read + Send + 'static) -> Receiver<String> {
    let (sender, receiver) = channel();
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        let _ = stream.read_to_end(&mut bytes);
        let _ = sender.send(String::from_utf8_lossy(&bytes).into_owned());
    });
    receiver
}

/// Runs a command to its end and collects what it wrote. Fails the test if it does not end in time, or if something
/// it left running still holds its output open: a script that captures the output would wait for ever.
#[track_caller]
pub(crate) fn finish(mut command: Command) -> Answer {
    use std::os::unix::process::ExitStatusExt;

    let mut child = command
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap_or_else(|error| panic!("starting {command:?}: {error}"));
    let out = drain(child.stdout.take().expect("a pipe"));
    let err = drain(child.stderr.take().expect("a pipe"));
    let mut status = None;
    wait::within(wait::PATIENCE, || {
        status = child.try_wait().expect("waiting for a child");
        status.is_some()
    });
    let Some(status) = status else {
        let _ = child.kill();
        let _ = child.wait();
        let err = err.recv_timeout(Duration::from_secs(1)).unwrap_or_default();
        panic!("{command:?} did not end in {:?}: {err}", wait::PATIENCE);
    };
    let patience = Duration::from_secs(10);
    let out = out
        .recv_timeout(patience)
        .unwrap_or_else(|_| panic!("{command:?} left its standard output open"));
    let err = err
        .recv_timeout(patience)
        .unwrap_or_else(|_| panic!("{command:?} left its standard error open"));
    let report = serde_json::from_str(&out).unwrap_or(Value::Null);
    let status = status
        .code()
        .unwrap_or_else(|| 128 + status.signal().unwrap_or(0));
    Answer {
        status,
        out,
        err,
        report,
    }
}
