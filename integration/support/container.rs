//! Containers of a test: bundles made for it, and a guard that leaves none behind.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::Value;

use super::session::{Answer, DONE, Session, finish};

/// A session whose containers are gone when it is.
#[derive(Debug)]
pub(crate) struct Containers {
    /// The session whose root they are below.
    pub(crate) session: Session,
}

impl Containers {
    /// None yet.
    pub(crate) fn new() -> Self {
        Self {
            session: Session::new(),
        }
    }

    /// Makes a bundle with `fixtures/bundles/make.sh`: its kind, options and arguments.
    #[track_caller]
    pub(crate) fn bundle(&self, name: &str, arguments: &[&str]) -> PathBuf {
        let bundle = self.session.scratch().join(name);
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/bundles/make.sh");
        let mut command = Command::new(script);
        command.arg(&bundle).args(arguments);
        finish(command).expect(DONE, "make.sh");
        bundle
    }

    /// Makes a bundle of busybox that runs this shell script.
    #[track_caller]
    pub(crate) fn script(&self, name: &str, script: &str) -> PathBuf {
        self.bundle(name, &["busybox", "--", "sh", "-c", script])
    }

    /// `snapback ARGUMENTS…` with the output going to `NAME.log`, as what stays with a container in the background.
    #[track_caller]
    pub(crate) fn run_logged(&self, log: &Path, arguments: &[&str]) -> Answer {
        let file = File::create(log).expect("making a file");
        let mut command = self.session.command();
        command.args(arguments);
        let status = command
            .stdout(file.try_clone().expect("duplicating a descriptor"))
            .stderr(file)
            .stdin(Stdio::null())
            .status()
            .expect("starting snapback");
        let err = std::fs::read_to_string(log).unwrap_or_default();
        Answer {
            status: status.code().unwrap_or(-1),
            out: String::new(),
            err,
            report: Value::Null,
        }
    }

    /// `run --detach`; returns the init's PID.
    #[track_caller]
    pub(crate) fn start(&self, id: &str, bundle: &Path) -> i32 {
        self.start_with(&[], id, bundle)
    }

    /// The same with an overlay, so that its files can go back.
    #[track_caller]
    pub(crate) fn start_with_layer(&self, id: &str, bundle: &Path) -> i32 {
        self.start_with(&["--overlay"], id, bundle)
    }

    /// The same with options of `run`.
    #[track_caller]
    pub(crate) fn start_with(&self, options: &[&str], id: &str, bundle: &Path) -> i32 {
        let log = self.session.scratch().join(format!("{id}.log"));
        let path = bundle.to_str().expect("a path in UTF-8");
        let arguments = [&["run", "--detach", "--bundle", path], options, &[id]].concat();
        self.run_logged(&log, &arguments)
            .expect(DONE, "run --detach");
        self.pid(id)
    }

    /// The PID of a container's init.
    #[track_caller]
    pub(crate) fn pid(&self, id: &str) -> i32 {
        let state = self.session.run(&["state", id]).expect(DONE, "state");
        i32::try_from(state.number("pid")).expect("a PID")
    }

    /// The status of a container.
    #[track_caller]
    pub(crate) fn status(&self, id: &str) -> String {
        let state = self.session.run(&["state", id]).expect(DONE, "state");
        state.text("status").to_owned()
    }
}

impl Drop for Containers {
    fn drop(&mut self) {
        let listed = self.session.run(&["list", "--quiet"]);
        for id in listed.out.lines() {
            let deleted = self.session.run(&["delete", "--force", id]);
            assert!(
                deleted.status == DONE || std::thread::panicking(),
                "{deleted:#?}"
            );
        }
    }
}
