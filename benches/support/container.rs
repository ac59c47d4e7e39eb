//! Containers of the command, with a layer of their own on a disk.

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

/// A container that is gone with its files when this is.
pub(crate) struct Container {
    /// Where its bundle, its layer and its state are.
    pub(crate) place: PathBuf,
    /// PID of its init.
    pub(crate) pid: i32,
}

/// Cgroups are named after it: two benches at the same time must not have the same.
pub(crate) fn id() -> String {
    format!("bench-{}", std::process::id())
}

impl Container {
    /// Makes a bundle (`fixtures/bundles/make.sh` has the arguments) and runs it.
    pub(crate) fn start(bundle: &[&str]) -> Container {
        Container::start_in(Path::new(env!("CARGO_TARGET_TMPDIR")), bundle)
    }

    /// The same in a directory that is given.
    pub(crate) fn start_in(above: &Path, bundle: &[&str]) -> Container {
        let place = above.join(format!("container-{}", std::process::id()));
        let mut container = Container { place, pid: 0 };
        std::fs::create_dir_all(container.place.join("layer")).expect("making a directory");
        let make = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/bundles/make.sh");
        let mut make = Command::new(make);
        make.arg(container.place.join("bundle")).args(bundle);
        must(&mut make);
        container.run();
        container
    }

    /// Runs it with the layer there is.
    pub(crate) fn run(&mut self) {
        let mut command = self.command();
        command
            .args(["run", "--detach"])
            .arg(format!("--overlay={}", self.place.join("layer").display()))
            .arg("--bundle")
            .arg(self.place.join("bundle"))
            .arg(id());
        // What stays with the program must not be ours.
        let status = command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status();
        assert!(status.expect("starting snapback").success(), "run");
        let state = self.json(&["state"]);
        self.pid = state["pid"].as_i64().expect("a PID") as i32;
    }

    /// The command with our state directory.
    pub(crate) fn command(&self) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_snapback"));
        command.arg("--root").arg(self.place.join("state"));
        command
    }

    /// A verb with its options.
    pub(crate) fn ask(&self, arguments: &[&str]) -> Output {
        must(self.command().args(arguments).arg(id()))
    }

    /// The same of one that prints JSON.
    pub(crate) fn json(&self, arguments: &[&str]) -> Value {
        serde_json::from_slice(&self.ask(arguments).stdout).expect("JSON")
    }

    /// A file as the container sees it.
    pub(crate) fn path(&self, path: &str) -> PathBuf {
        PathBuf::from(format!("/proc/{}/root{path}", self.pid))
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        let _ = self.command().args(["delete", "--force", &id()]).status();
        let _ = std::fs::remove_dir_all(&self.place);
    }
}

/// Runs a command that has to succeed.
pub(crate) fn must(command: &mut Command) -> Output {
    let output = command.output().expect("starting a command");
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {error}");
    output
}

/// Waits until something holds, a minute at most.
pub(crate) fn wait_for(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !condition() {
        assert!(Instant::now() < deadline, "waited in vain for {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}
