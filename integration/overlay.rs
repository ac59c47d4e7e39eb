//! `create` and `run` with `--overlay`: what a container writes goes into a layer of its own.

use std::fs;
use std::path::Path;
use std::process::Command;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;

use crate::runtime::{configure, left, text, unique};
use crate::support::container::Containers;
use crate::support::session::{Answer, DONE, ERROR, finish};
use crate::support::wait;

/// Changes files of every kind of its root directory, then stays.
const WRITES: &str = "echo new >/new; rm /etc/group; rm -r /var; mkdir /var; echo more >>/etc/passwd; chmod 700 /root; \
    touch /ready; trap 'exit 0' TERM; while :; do sleep 1 & wait $!; done";

/// Everything below a directory: names, types, modes and contents.
fn listing(directory: &Path) -> String {
    let mut command = Command::new("sh");
    command.current_dir(directory).args([
        "-c",
        "find . -printf '%p %y %m %s %T@ %l\\n' | sort; find . -type f -size -9 -exec md5sum {} + | sort",
    ]);
    finish(command).expect(DONE, "find").out
}

fn mounts(pid: &str) -> String {
    fs::read_to_string(format!("/proc/{pid}/mountinfo")).expect("mountinfo")
}

fn run_detached(containers: &Containers, id: &str, bundle: &Path, overlay: &str) -> Answer {
    let log = containers.session.scratch().join("log");
    let arguments = ["run", "--detach", overlay, "--bundle", text(bundle), id];
    containers.run_logged(&log, &arguments)
}

/// The container's own view of a file.
fn inside(pid: i32, path: &str) -> std::path::PathBuf {
    Path::new("/proc").join(format!("{pid}/root{path}"))
}

#[test]
fn the_bundle_stays_as_it_is_and_the_layer_goes_with_the_container() {
    let containers = Containers::new();
    let session = &containers.session;
    let id = &unique("layer");
    let bundle = containers.script("bundle", WRITES);
    let before = listing(&bundle);
    run_detached(&containers, id, &bundle, "--overlay").expect(DONE, "run");
    let pid = containers.pid(id);
    wait::until("it has written", || inside(pid, "/ready").exists());

    assert_eq!(listing(&bundle), before);
    let upper = session.root().join(".overlays").join(id).join("upper");
    let root = mounts(&pid.to_string())
        .lines()
        .find(|line| line.split(' ').nth(4) == Some("/"))
        .expect("a root")
        .to_owned();
    assert!(
        root.contains(&format!("upperdir={}", text(&upper))),
        "{root}"
    );
    assert!(!mounts("self").contains(text(&upper)));
    assert_eq!(fs::read_to_string(upper.join("new")).unwrap(), "new\n");
    let seen = session.run(&["exec", id, "sh", "-c", "cat /new; ls -A /var; ls /etc"]);
    assert_eq!(seen.expect(DONE, "exec").out, "new\npasswd\n");

    session
        .run(&["delete", "--force", id])
        .expect(DONE, "delete");
    assert_eq!(listing(&bundle), before);
    assert_eq!(left(&containers), [] as [String; 0]);
}

#[test]
fn a_layer_in_a_directory_is_kept_and_used_by_one_at_a_time() {
    let containers = Containers::new();
    let session = &containers.session;
    let (first, second) = (&unique("kept"), &unique("second"));
    let script = "[ -e /kept ] && touch /again; touch /kept; sleep 1000";
    let bundle = containers.script("bundle", script);
    // All that the mount options have to escape.
    let place = session.scratch().join("la,y:e\\r x");
    fs::create_dir(&place).unwrap();
    let option = format!("--overlay={}", text(&place));
    for round in 0..2 {
        run_detached(&containers, first, &bundle, &option).expect(DONE, "run");
        let pid = containers.pid(first);
        wait::until("it has written", || inside(pid, "/kept").exists());
        if round == 1 {
            wait::until("it has seen", || inside(pid, "/again").exists());
        }
        let refused = run_detached(&containers, second, &bundle, &option).expect(ERROR, "second");
        assert!(
            refused.err.contains(&format!("process {pid} runs on it")),
            "{refused:?}"
        );
        session
            .run(&["delete", "--force", first])
            .expect(DONE, "delete");
        let entries: Vec<_> = fs::read_dir(&place)
            .unwrap()
            .map(|entry| entry.unwrap().file_name())
            .collect();
        assert_eq!(entries, ["upper"]);
        assert!(place.join("upper/kept").exists());
        assert_eq!(left(&containers), [] as [String; 0]);
    }
    assert!(!bundle.join("rootfs/kept").exists());
}

#[test]
fn what_can_not_hold_a_layer_or_lie_below_one_is_refused() {
    let containers = Containers::new();
    let scratch = containers.session.scratch();
    let bundle = containers.script("bundle", "true");
    let before = listing(&bundle);
    for name in ["upper", "work", "merged", "layer"] {
        fs::create_dir(scratch.join(name)).unwrap();
    }
    let rootfs = text(&bundle).to_owned() + "/rootfs";
    let overlay = |lower: &str, at: &str| {
        let scratch = scratch.display();
        format!(
            "mount -t overlay o -o lowerdir={lower},upperdir={scratch}/upper,workdir={scratch}/work {at}"
        )
    };
    let merged = scratch.join("merged");
    let on_overlay = overlay(&rootfs, text(&merged));
    let root_is_overlay = overlay(&rootfs, &rootfs);
    let inside = format!("mount -t tmpfs t {rootfs}/var");
    let option = |path: &Path| format!("--overlay={}", path.display());
    let cases = [
        ("true", option(&scratch.join("nowhere")), "No such file"),
        (
            "true",
            option(&bundle.join("config.json")),
            "Not a directory",
        ),
        ("true", option(&bundle), "must not lie in one another"),
        (&on_overlay, option(&merged), "can't hold an upper layer"),
        (
            &root_is_overlay,
            option(&scratch.join("layer")),
            "overlay already",
        ),
        (&inside, "--overlay".to_owned(), "rootfs/var"),
    ];
    for (setup, option, reason) in cases {
        let id = unique("refused");
        let mut command = Command::new("unshare");
        let script = format!("{setup} && exec \"$@\"");
        command
            .args(["--mount", "sh", "-c", &script, "sh"])
            .arg(env!("CARGO_BIN_EXE_snapback"))
            .arg("--root")
            .arg(containers.session.root())
            .args(["run", &option, "--bundle", text(&bundle), &id]);
        let refused = finish(command).expect(ERROR, &option);
        assert!(refused.err.contains(reason), "{reason}: {refused:?}");
        assert_eq!(left(&containers), [] as [String; 0], "{option}");
    }
    assert_eq!(listing(&bundle), before);
}

#[test]
fn nothing_is_left_of_a_runtime_that_was_killed() {
    let containers = Containers::new();
    let session = &containers.session;
    let id = &unique("killed");
    let bundle = containers.script("bundle", "touch /ready; sleep 1000");

    // While it attends to the container.
    let mut command = session.command();
    command.args(["run", "--overlay", "--bundle", text(&bundle), id]);
    let mut run = command.spawn().unwrap();
    wait::until("the program runs", || {
        let state = session.run(&["state", id]);
        let pid = i32::try_from(state.report["pid"].as_u64().unwrap_or(0)).unwrap();
        pid != 0 && inside(pid, "/ready").exists()
    });
    run.kill().unwrap();
    run.wait().unwrap();
    session
        .run(&["delete", "--force", id])
        .expect(DONE, "delete");
    assert_eq!(left(&containers), [] as [String; 0]);

    // While it creates it: a hook holds it there.
    let reached = session.scratch().join("reached");
    let hook = format!(
        "touch {}; while kill -0 $PPID; do sleep 0.01; done",
        text(&reached)
    );
    configure(
        &bundle,
        |config| {
            config["hooks"] =
                json!({ "createRuntime": [{ "path": "/bin/sh", "args": ["sh", "-c", hook] }] })
        },
    );
    let mut command = session.command();
    command.args(["create", "--overlay", "--bundle", text(&bundle), id]);
    let mut create = command.spawn().unwrap();
    wait::until("the hook runs", || reached.exists());
    kill(Pid::from_raw(create.id().cast_signed()), Signal::SIGKILL).unwrap();
    create.wait().unwrap();
    assert!(left(&containers).contains(&".overlays".to_owned()));
    session
        .run(&["delete", "--force", id])
        .expect(DONE, "delete");
    assert_eq!(left(&containers), [] as [String; 0]);
    assert!(!mounts("self").contains(id.as_str()));
}
