//! Which files go back with a container, and what the command tells of them.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::{Value, json};

use crate::runtime::text;
use crate::support::container::{Containers, unique};
use crate::support::session::{DONE, ERROR, REFUSED, USAGE};
use crate::support::{numbers, skip, wait};

/// A container that does nothing but wait, once it has written `/ready`.
fn idle(containers: &Containers, options: &[&str]) -> PathBuf {
    let script = "echo old >/kept; echo old >/tmp/kept; touch /ready; while :; do sleep 1000; done";
    let arguments = [&["busybox"], options, &["--", "sh", "-c", script]].concat();
    containers.bundle("bundle", &arguments)
}

fn ready(pid: i32) -> impl Fn(&str) -> PathBuf {
    let inside = move |path: &str| PathBuf::from(format!("/proc/{pid}/root{path}"));
    wait::until("it has started", || inside("/ready").exists());
    inside
}

fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_else(|error| error.to_string())
}

#[test]
fn a_plain_root_is_refused_and_each_remedy_works() {
    let containers = Containers::new();
    let session = &containers.session;
    let id = &unique("plain");
    let bundle = idle(&containers, &[]);
    let inside = ready(containers.start(id, &bundle));

    let refused = session
        .run(&["checkpoint", "--json", id])
        .expect(REFUSED, "checkpoint");
    let remedy = refused.report["refused"]["remedy"].as_str().unwrap();
    for word in ["--overlay", "--volume /", "--no-files"] {
        assert!(remedy.contains(word), "{remedy}");
    }
    assert_eq!(containers.status(id), "running");

    session
        .run(&["checkpoint", "--no-files", id])
        .expect(DONE, "without files");
    fs::write(inside("/kept"), "new\n").unwrap();
    session.run(&["rollback", id]).expect(DONE, "rollback");
    assert_eq!(read(&inside("/kept")), "new\n");

    session
        .run(&["checkpoint", "--volume", "/", id])
        .expect(DONE, "with the root as a volume");
    fs::write(inside("/kept"), "newer\n").unwrap();
    fs::remove_file(inside("/ready")).unwrap();
    session
        .run(&["rollback", "--verify", id])
        .expect(DONE, "rollback");
    assert_eq!(read(&inside("/kept")), "new\n");
    assert!(inside("/ready").exists());
}

#[test]
fn the_report_tells_what_is_included_and_what_is_not() {
    let containers = Containers::new();
    let session = &containers.session;
    let scratch = session.scratch();
    for name in ["data", "other", "fixed"] {
        fs::create_dir(scratch.join(name)).unwrap();
    }
    let mount = |name: &str, rest: &str| format!("{}:/mnt/{name}{rest}", text(&scratch.join(name)));
    let (data, other, fixed) = (mount("data", ""), mount("other", ""), mount("fixed", ":ro"));
    let mounts = [
        "--mount", &data, "--mount", &other, "--mount", &fixed, "--tmpfs", "/tmp",
    ];
    let bundle = idle(&containers, &mounts);
    let id = &unique("told");
    let inside = ready(containers.start_with_layer(id, &bundle));
    fs::write(inside("/mnt/data/kept"), "old\n").unwrap();

    let taken = session.run(&["checkpoint", "--json", "--volume", "/mnt/data/", id]);
    let files = taken.expect(DONE, "checkpoint").report["files"].clone();
    let included: Vec<&str> = files["included"]
        .as_array()
        .unwrap()
        .iter()
        .map(|place| place.as_str().unwrap())
        .collect();
    for place in ["/", "/tmp", "/dev", "/dev/shm", "/mnt/data"] {
        assert!(included.contains(&place), "{place}: {files}");
    }
    let why = |place: &str| {
        let left_out = files["left_out"].as_array().unwrap();
        let found = left_out.iter().find(|mount| mount["mount_point"] == place);
        found.map_or(String::new(), |mount| {
            mount["why"].as_str().unwrap().to_owned()
        })
    };
    assert!(why("/mnt/other").contains("--volume /mnt/other"), "{files}");
    assert_eq!(why("/mnt/fixed"), "read-only");
    assert!(files["files"].as_u64().unwrap() >= 4, "{files}");

    for path in ["/kept", "/tmp/kept", "/mnt/data/kept", "/mnt/other/kept"] {
        fs::write(inside(path), "new\n").unwrap();
    }
    let back = session.run(&["rollback", "--json", "--verify", id]);
    let back = back.expect(DONE, "rollback");
    assert!(
        back.report["files"]["files"].as_u64().unwrap() >= 3,
        "{back:?}"
    );
    for path in ["/kept", "/tmp/kept", "/mnt/data/kept"] {
        assert_eq!(read(&inside(path)), "old\n", "{path}");
    }
    assert_eq!(read(&inside("/mnt/other/kept")), "new\n");
    let human = session
        .run(&["checkpoint", id])
        .expect(DONE, "checkpoint")
        .out;
    assert!(human.contains("files in /"), "{human}");
    assert!(
        human.contains("/mnt/data") && human.contains("not included"),
        "{human}"
    );
}

#[test]
fn a_diff_lists_what_a_rollback_would_undo() {
    let containers = Containers::new();
    let session = &containers.session;
    let id = &unique("diff");
    let bundle = idle(&containers, &["--tmpfs", "/tmp"]);
    let inside = ready(containers.start_with_layer(id, &bundle));
    let diff = |options: &[&str]| {
        let arguments = [&["diff"], options, &[id.as_str()]].concat();
        session.run(&arguments)
    };
    let none = diff(&[]).expect(ERROR, "diff without a checkpoint");
    assert!(none.err.contains("checkpoint"), "{none:?}");
    session
        .run(&["checkpoint", "--name", "one", id])
        .expect(DONE, "checkpoint");
    assert_eq!(diff(&["--name", "one"]).expect(DONE, "diff").out, "");

    fs::write(inside("/kept"), "new and longer\n").unwrap();
    fs::write(inside("/etc/new"), "12345").unwrap();
    fs::write(inside("/tmp/a\nb"), "").unwrap();
    fs::remove_file(inside("/etc/group")).unwrap();
    fs::remove_file(inside("/tmp/kept")).unwrap();
    let before = fs::metadata(bundle.join("rootfs/etc/group")).unwrap().len();
    let told = diff(&["--name", "one"]).expect(DONE, "diff").out;
    let expected = format!(
        "C /etc\nD /etc/group  {before} B\nA /etc/new  5 B\nC /kept  4 B -> 15 B\nC /tmp\nA /tmp/a\\x0ab  0 B\nD \
         /tmp/kept  4 B\n"
    );
    assert_eq!(told, expected);
    let printed = diff(&["--name", "one", "--json"])
        .expect(DONE, "diff")
        .report;
    let changes = printed["changes"].as_array().unwrap();
    assert_eq!(changes.len(), 7);
    let kept = json!({ "kind": "changed", "path": "/kept", "before": 4, "after": 15 });
    assert!(changes.contains(&kept), "{printed}");

    session
        .run(&["rollback", "--to", "one", id])
        .expect(DONE, "rollback");
    assert_eq!(diff(&["--name", "one"]).expect(DONE, "diff").out, "");
}

#[test]
fn content_is_counted_limited_and_freed() {
    let containers = Containers::new();
    let session = &containers.session;
    let id = &unique("bytes");
    let bundle = idle(&containers, &[]);
    let inside = ready(containers.start_with_layer(id, &bundle));
    const SIZE: u64 = 3 << 20;
    fs::write(inside("/large"), vec![1; SIZE as usize]).unwrap();
    let held = || -> Vec<u64> {
        let listed = session.run(&["checkpoints", "--json", id]).report;
        let checkpoints = listed["checkpoints"].as_array().unwrap();
        let bytes = |checkpoint: &Value| checkpoint["file_bytes"].as_u64().unwrap();
        checkpoints.iter().map(bytes).collect()
    };
    let take = |name: &str, limit: &str| {
        session.run(&[
            "checkpoint",
            "--pin",
            "--name",
            name,
            "--max-bytes",
            limit,
            id,
        ])
    };
    let refused = take("small", "1M").expect(REFUSED, "too little");
    assert!(refused.err.contains("--max-bytes"), "{refused:?}");
    assert_eq!(held(), [] as [u64; 0]);
    assert_eq!(fs::metadata(inside("/large")).unwrap().len(), SIZE);

    take("one", "4M").expect(DONE, "checkpoint");
    assert!((SIZE..4 << 20).contains(&held()[0]), "{:?}", held());
    let table = session
        .run(&["checkpoints", id])
        .expect(DONE, "checkpoints")
        .out;
    assert!(
        table.contains("FILES") && table.contains("3.0 MiB"),
        "{table}"
    );
    // The same content is kept once, other content is one too many.
    take("two", "4M").expect(DONE, "the same again");
    fs::write(inside("/large"), vec![2; SIZE as usize]).unwrap();
    take("three", "4M").expect(REFUSED, "other content");
    for name in ["one", "two"] {
        session
            .run(&["rollback", "--to", name, id])
            .expect(DONE, "rollback");
    }
    session
        .run(&["release", "--name", "one", id])
        .expect(DONE, "release");
    session
        .run(&["release", "--name", "two", id])
        .expect(DONE, "release");
    wait::until("the keeper has ended", || session.keepers().is_empty());
    fs::write(inside("/large"), vec![2; SIZE as usize]).unwrap();
    take("three", "4M").expect(DONE, "after the release");
    // One that is not pinned makes room.
    let loose = |name: &str| session.run(&["checkpoint", "--name", name, "--max-bytes", "7M", id]);
    fs::write(inside("/large"), vec![3; SIZE as usize]).unwrap();
    loose("four").expect(DONE, "beside the pinned one");
    fs::write(inside("/large"), vec![4; SIZE as usize]).unwrap();
    loose("five").expect(DONE, "in place of the loose one");
    let listed = session.run(&["checkpoints", "--json", id]).report;
    let names = listed["checkpoints"].as_array().unwrap().iter();
    let names: Vec<&str> = names.map(|info| info["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["three", "five"]);
    session
        .run(&["release", "--all", id])
        .expect(DONE, "release");
}

#[test]
fn options_that_make_no_sense_are_told() {
    let containers = Containers::new();
    let session = &containers.session;
    let id = &unique("senseless");
    let bundle = idle(&containers, &[]);
    let _ = ready(containers.start_with_layer(id, &bundle));
    for options in [
        &["--no-files", "--volume", "/tmp"][..],
        &["--keep", "0"],
        &["--volume", "tmp"],
        &["--max-bytes", "much"],
    ] {
        let arguments = [&["checkpoint"], options, &[id.as_str()]].concat();
        session.run(&arguments).expect(USAGE, &options.concat());
    }
    let refused = session.run(&["checkpoint", "--volume", "/nowhere", id]);
    let refused = refused.expect(REFUSED, "a volume that is not there");
    assert!(refused.err.contains("/nowhere"), "{refused:?}");
}

#[test]
fn files_of_the_host_stay_and_the_report_says_so() {
    let mut session = crate::support::session::Session::new();
    let program = crate::support::fixture::Fixture::start("registers");
    let taken = session.checkpoint(program.pid());
    assert_eq!(taken.report["files"]["included"], json!([]));
    assert_eq!(taken.report["files"]["left_out"][0]["mount_point"], "/");
    let volume = [
        "checkpoint",
        "--volume",
        "/tmp",
        "--pid",
        &program.pid().to_string(),
    ];
    session
        .run(&volume)
        .expect(REFUSED, "a volume of the host's");
}

/// podman with storage of its own, on overlays. Dropped, its container and all it has are gone.
pub(crate) struct Podman<'a> {
    /// Where all of it is.
    pub(crate) place: &'a Path,
    /// The runtime.
    pub(crate) runtime: &'a str,
}

impl Podman<'_> {
    pub(crate) const CONTAINER: &'static str = "snapback-test";

    fn output(&self, arguments: &[&str]) -> Output {
        let configuration = self.place.join("containers.conf");
        fs::write(
            &configuration,
            "[containers]\ndefault_ulimits=[\"nofile=20000:20000\",\"nproc=32768:32768\"]\n\
             [engine]\ncgroup_manager=\"cgroupfs\"\nevents_logger=\"file\"\n",
        )
        .expect("writing a file");
        Command::new("podman")
            .env("CONTAINERS_CONF", configuration)
            .args(["--runtime", self.runtime, "--storage-driver", "overlay"])
            .arg("--root")
            .arg(self.place.join("storage"))
            .arg("--runroot")
            .arg(self.place.join("run"))
            .arg("--tmpdir")
            .arg(self.place.join("tmp"))
            .args(arguments)
            .output()
            .expect("starting podman")
    }

    #[track_caller]
    pub(crate) fn must(&self, arguments: &[&str]) -> String {
        let output = self.output(arguments);
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "podman {arguments:?}: {error}");
        String::from_utf8_lossy(&output.stdout).trim().to_owned()
    }

    /// Makes an image of the root file system of a bundle; returns its name.
    #[track_caller]
    pub(crate) fn import(&self, bundle: &Path) -> String {
        let image = self.place.join("image.tar");
        let mut tar = Command::new("tar");
        tar.arg("-C")
            .arg(bundle.join("rootfs"))
            .arg("-cf")
            .arg(&image)
            .arg(".");
        crate::support::session::finish(tar).expect(DONE, "tar");
        self.must(&["import", "--quiet", text(&image)])
    }

    #[track_caller]
    fn shell(&self, script: &str) -> String {
        self.must(&["exec", Self::CONTAINER, "sh", "-c", script])
    }
}

impl Drop for Podman<'_> {
    fn drop(&mut self) {
        self.output(&["rm", "--force", "--time", "0", "--volumes", Self::CONTAINER]);
        // What it started to clean up after the container mounts once more.
        let place = self.place.to_string_lossy();
        let is_left = || {
            numbers::with_argument(&place)
                .into_iter()
                .any(numbers::is_alive)
        };
        wait::within(wait::PATIENCE, || !is_left());
        // podman mounts the directory of its layers on itself.
        let layers = self.place.join("storage/overlay");
        let _ = Command::new("umount").arg(layers).output();
    }
}

#[test]
fn a_podman_container_comes_back_with_its_layer_and_its_volumes() {
    if !Path::new("/usr/bin/podman").exists() {
        skip!("no podman");
    }
    let containers = Containers::new();
    let session = &containers.session;
    let bundle = containers.bundle("bundle", &["busybox"]);
    let place = session.scratch().join("podman");
    fs::create_dir(&place).expect("making a directory");
    let podman = Podman {
        place: &place,
        runtime: "runc",
    };
    let image = podman.import(&bundle);
    let script = "for place in / /named /anonymous /dev/shm; do echo old >$place/kept; done; touch /ready; sleep 100000";
    podman.must(&[
        "run",
        "--detach",
        "--net",
        "none",
        "--name",
        Podman::CONTAINER,
        "--volume",
        "named:/named",
        "--volume",
        "/anonymous",
        &image,
        "sh",
        "-c",
        script,
    ]);
    let pid = podman.must(&["inspect", "--format", "{{.State.Pid}}", Podman::CONTAINER]);
    let _ = ready(pid.parse().expect("a PID"));

    let taken = session
        .run(&["checkpoint", "--json", "--pid", &pid])
        .expect(DONE, "checkpoint");
    let included = &taken.report["files"]["included"];
    for place in ["/", "/named", "/anonymous", "/dev/shm"] {
        assert!(
            included.as_array().unwrap().contains(&json!(place)),
            "{included}"
        );
    }
    podman.shell("echo new >/kept; rm /named/kept; mkdir /anonymous/new; echo new >/dev/shm/kept; rm /etc/passwd");
    session
        .run(&["rollback", "--verify", "--pid", &pid])
        .expect(DONE, "rollback");
    let kept = podman.shell(
        "cat /kept /named/kept /anonymous/kept /dev/shm/kept; ls /anonymous; ls /etc/passwd",
    );
    assert_eq!(kept, "old\nold\nold\nold\nkept\n/etc/passwd");
    session
        .run(&["release", "--pid", &pid])
        .expect(DONE, "release");
}
