//! `checkpoint --image-path`: straight to disk, as runc does it.

use std::fs;
use std::path::{Path, PathBuf};

use snapback::image::Opened;

use crate::containers::{bundle, ours};
use crate::files::Podman;
use crate::restore::restored;
use crate::support::container::{Containers, unique};
use crate::support::fixture::Fixture;
use crate::support::session::{Answer, DONE, REFUSED, USAGE};
use crate::support::{skip, wait};

/// A fixture program in a container, and where an image of it goes.
struct Setting {
    containers: Containers,
    fixture: Fixture,
    bundle: PathBuf,
    id: String,
    image: PathBuf,
}

const PROGRAM: &str = "child_family";

impl Setting {
    fn new(name: &str) -> Self {
        let containers = Containers::new();
        let bundle = bundle(&containers, PROGRAM, &[]);
        let id = unique(&format!("to-disk-{name}"));
        let mut fixture = Fixture::launch(PROGRAM, ours(&containers.session, &bundle, &id));
        fixture.verify("before the checkpoint");
        let image = containers.session.scratch().join("image");
        Self {
            containers,
            fixture,
            bundle,
            id,
            image,
        }
    }

    fn checkpoint(&self, options: &[&str]) -> Answer {
        let image = self.image.to_str().expect("a path in UTF-8");
        let start = ["checkpoint", "--image-path", image];
        let arguments = [&start[..], options, &[&self.id]].concat();
        self.containers.session.run(&arguments)
    }

    /// A container made of the image is as that which it was made of.
    fn restore(&self) {
        let session = &self.containers.session;
        let id = unique("from-disk");
        let command = restored(session, &self.bundle, &self.image, &id, &[]);
        let mut fixture = Fixture::take_over(PROGRAM, command);
        wait::until("the container runs, or restore has ended", || {
            let listed = session.run(&["list", "--format", "json"]);
            let ended = matches!(fixture.family.child.try_wait(), Ok(Some(_)));
            ended || listed.out.contains("\"running\"")
        });
        fixture.verify("after it was restored");
        fixture.run_on();
        fixture.verify("run on after it was restored");
    }
}

#[test]
fn the_container_is_ended_and_can_be_restored() {
    let mut setting = Setting::new("ended");
    // As podman calls it.
    let work = setting.containers.session.scratch().join("work");
    let work = work.to_str().expect("a path in UTF-8");
    let options = ["--work-path", work, "--tcp-established", "--file-locks"];
    let answer = setting.checkpoint(&options).expect(DONE, "checkpoint");
    assert_eq!(answer.out, "");
    wait::until("it has ended", || {
        matches!(setting.fixture.family.child.try_wait(), Ok(Some(_)))
    });
    wait::until("so has its keeper", || {
        setting.containers.session.keepers().is_empty()
    });
    Opened::open(&setting.image)
        .expect("an image")
        .verify()
        .expect("whole");
    setting.restore();
}

#[test]
fn left_running_it_is_as_before() {
    let mut setting = Setting::new("running");
    // podman says it twice.
    let options = ["--leave-running", "--leave-running", "--compress", "zstd"];
    setting.checkpoint(&options).expect(DONE, "checkpoint");
    let session = &setting.containers.session;
    assert_eq!(setting.containers.status(&setting.id), "running");
    setting.fixture.verify("after the checkpoint");
    // Nothing of it is in RAM.
    wait::until("the keeper has ended", || {
        let keepers = session.keepers().into_iter();
        let is_keeper = |pid: &i32| {
            let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            line.split(|byte| *byte == 0).any(|word| word == b"keeper")
        };
        keepers.filter(is_keeper).count() == 0
    });
    setting.fixture.mutate();
    session
        .run(&["kill", &setting.id, "KILL"])
        .expect(DONE, "kill");
    wait::until("it has ended", || {
        matches!(setting.fixture.family.child.try_wait(), Ok(Some(_)))
    });
    setting.restore();
}

#[test]
fn what_can_t_be_written_leaves_it_running() {
    let mut setting = Setting::new("refused");
    fs::create_dir(&setting.image).expect("making a directory");
    fs::write(setting.image.join("letter"), "dear").expect("writing");
    for options in [&[][..], &["--leave-running"]] {
        let answer = setting.checkpoint(options).expect(REFUSED, "checkpoint");
        assert!(
            answer.err.contains("empty or does not exist"),
            "{answer:#?}"
        );
        setting.fixture.verify("refused");
        assert_eq!(setting.containers.status(&setting.id), "running");
    }
    for wrong in [
        &["--pre-dump"][..],
        &["--parent-path", "/x"],
        &["--name", "x"],
        &["--no-files"],
    ] {
        let answer = setting.checkpoint(wrong).expect(USAGE, "checkpoint");
        assert!(answer.err.contains(wrong[0]), "{answer:#?}");
    }
    assert_eq!(fs::read_dir(&setting.image).expect("listing").count(), 1);
    setting.fixture.send(b"q");
    wait::until("it has ended", || {
        matches!(setting.fixture.family.child.try_wait(), Ok(Some(_)))
    });
}

/// podman, with our runtime: a container that counts goes on counting where it was, also from an export of it.
#[test]
fn podman_checkpoints_with_our_runtime() {
    for needed in ["/usr/bin/podman", "/usr/sbin/criu"] {
        // podman asks for CRIU, whatever the runtime.
        if !Path::new(needed).exists() {
            skip!("no {needed}");
        }
    }
    let containers = Containers::new();
    let bundle = containers.bundle("bundle", &["busybox"]);
    let place = containers.session.scratch().join("podman");
    fs::create_dir(&place).expect("making a directory");
    let podman = Podman {
        place: &place,
        runtime: env!("CARGO_BIN_EXE_snapback"),
    };
    let image = podman.import(&bundle);
    let script = "i=0; while :; do i=$((i + 1)); echo $i; sleep 0.1; done";
    let name = Podman::CONTAINER;
    let run = [
        "run", "--detach", "--net", "none", "--name", name, &image, "sh", "-c", script,
    ];
    podman.must(&run);
    // What the runtime says is in the log, too.
    let counted = || -> Vec<u32> {
        let log = podman.must(&["logs", name]);
        log.lines().filter_map(|line| line.parse().ok()).collect()
    };
    let goes_on = |from: usize| wait::until("it counts", || counted().len() > from + 3);
    goes_on(0);
    podman.must(&["container", "checkpoint", "--leave-running", name]);
    goes_on(counted().len());
    podman.must(&["container", "checkpoint", name]);
    let before = counted();
    podman.must(&["container", "restore", name]);
    goes_on(before.len());
    // Each number once, and none is missing.
    let check = || {
        let all = counted();
        assert_eq!(all, (1..=all.len() as u32).collect::<Vec<_>>());
    };
    check();

    let export = place.join("export.tar");
    let export = export.to_str().expect("a path in UTF-8");
    podman.must(&["container", "checkpoint", "--export", export, name]);
    podman.must(&["rm", name]);
    // The log is in it, too.
    podman.must(&["container", "restore", "--import", export]);
    goes_on(counted().len());
    check();
}
