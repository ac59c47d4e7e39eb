//! Containers of a test: bundles made for it, and a guard that leaves none behind.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::Value;

use super::session::{Answer, DONE, Session, finish};
use super::{numbers, wait};

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

    /// No container, no keeper, and no process of the container `id`.
    #[track_caller]
    pub(crate) fn leave_nothing(&self, id: &str) {
        let session = &self.session;
        assert_eq!(session.run(&["list", "-q"]).out, "");
        wait::until("the keeper has ended", || session.keepers().is_empty());
        let named = |pid: i32| {
            let path = format!("/proc/{pid}/cgroup");
            std::fs::read_to_string(path).is_ok_and(|text| text.contains(id))
        };
        wait::until("no process is left", || {
            !numbers::processes().into_keys().any(named)
        });
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

    /// Removes the state directory, when all containers are gone and their keepers have ended.
    #[track_caller]
    pub(crate) fn wipe(&self) {
        wait::until("the keepers have ended", || {
            self.session.keepers().is_empty()
        });
        std::fs::remove_dir_all(self.session.root()).expect("removing the state directory");
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

/// An ID no other test uses: cgroups are named after it.
pub(crate) fn unique(name: &str) -> String {
    format!("{name}-{}", std::process::id())
}

/// A container of runc's, gone when this is.
#[derive(Debug)]
pub(crate) struct Runc {
    root: PathBuf,
    id: String,
}

impl Runc {
    /// `runc run --detach`; returns the init's PID too.
    #[track_caller]
    pub(crate) fn start(bundle: &Path, scratch: &Path, id: String) -> (Self, i32) {
        let root = scratch.join("runc");
        let pid_file = scratch.join("runc.pid");
        let log = File::create(scratch.join("runc.log")).expect("making a file");
        let started = Command::new("runc")
            .arg("--root")
            .arg(&root)
            .args(["run", "--detach", "--pid-file"])
            .arg(&pid_file)
            .arg("--bundle")
            .arg(bundle)
            .arg(&id)
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("duplicating"))
            .stderr(log)
            .status()
            .expect("starting runc");
        let said = std::fs::read_to_string(scratch.join("runc.log")).unwrap_or_default();
        let container = Self { root, id };
        assert!(started.success(), "runc run: {said}");
        let pid = std::fs::read_to_string(pid_file).expect("a PID file");
        (container, pid.parse().expect("a PID"))
    }
}

impl Drop for Runc {
    fn drop(&mut self) {
        let _ = Command::new("runc")
            .arg("--root")
            .arg(&self.root)
            .args(["delete", "--force", &self.id])
            .status();
    }
}
