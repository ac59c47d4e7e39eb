//! The OCI verbs: a container's life, its processes, what runtimes get wrong.

use std::fs::{self, File};
use std::os::fd::OwnedFd;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

use crate::support::container::{Containers, unique};
use crate::support::session::{DONE, ERROR, USAGE, finish};
use crate::support::{numbers, wait};

/// runc's exit status of an `exec` that could not start its program.
const NOT_STARTED: i32 = 255;

pub(crate) fn text(path: &Path) -> &str {
    path.to_str().expect("a path in UTF-8")
}

/// The cgroups named so, in all hierarchies.
fn cgroups(id: &str) -> Vec<PathBuf> {
    let own = |hierarchy: &Path| hierarchy.join("snapback").join(id);
    let hierarchies = fs::read_dir("/sys/fs/cgroup").expect("cgroups").flatten();
    let mut found: Vec<_> = hierarchies.map(|entry| own(&entry.path())).collect();
    found.push(own(Path::new("/sys/fs/cgroup")));
    found.retain(|path| path.is_dir());
    found
}

/// What is left below the root directory.
pub(crate) fn left(containers: &Containers) -> Vec<String> {
    let entries = fs::read_dir(containers.session.root()).expect("the root directory");
    let names = entries.flatten().map(|entry| entry.file_name());
    names
        .map(|name| name.to_string_lossy().into_owned())
        .collect()
}

/// Changes a bundle's config.json.
pub(crate) fn configure(bundle: &Path, change: impl FnOnce(&mut Value)) {
    let path = bundle.join("config.json");
    let mut config = serde_json::from_slice(&fs::read(&path).expect("config.json")).expect("JSON");
    change(&mut config);
    fs::write(path, config.to_string()).expect("writing config.json");
}

#[test]
fn a_container_lives_from_create_to_delete() {
    let containers = Containers::new();
    let session = &containers.session;
    let id = &unique("life");
    let marker = "touch /started; trap 'exit 0' TERM; while :; do sleep 1 & wait $!; done";
    let bundle = containers.script("bundle", marker);
    let pid_file = session.scratch().join("pid");

    let log = session.scratch().join("log");
    let create = [
        "create",
        "--bundle",
        text(&bundle),
        "--pid-file",
        text(&pid_file),
        id,
    ];
    containers.run_logged(&log, &create).expect(DONE, "create");
    let pid = containers.pid(id);
    assert_eq!(fs::read_to_string(&pid_file).unwrap(), pid.to_string());
    assert_eq!(containers.status(id), "created");
    assert!(!bundle.join("rootfs/started").exists());
    assert!(!cgroups(id).is_empty());
    containers
        .run_logged(&log, &create)
        .expect(ERROR, "create again");
    assert_eq!(containers.pid(id), pid);

    session.run(&["start", id]).expect(DONE, "start");
    wait::until("the program runs", || {
        bundle.join("rootfs/started").exists()
    });
    assert_eq!(containers.status(id), "running");
    session.run(&["start", id]).expect(ERROR, "start again");
    session
        .run(&["delete", id])
        .expect(ERROR, "delete while it runs");
    assert!(numbers::is_alive(pid));

    session.run(&["kill", id, "TERM"]).expect(DONE, "kill");
    wait::until("it has stopped", || containers.status(id) == "stopped");
    assert_eq!(containers.pid(id), 0);
    session
        .run(&["kill", id])
        .expect(ERROR, "kill when it has stopped");
    session
        .run(&["kill", "--all", id, "KILL"])
        .expect(DONE, "kill --all when it has stopped");
    session.run(&["delete", id]).expect(DONE, "delete");
    let gone = session
        .run(&["state", id])
        .expect(ERROR, "state when it is deleted");
    assert!(gone.err.contains("does not exist"), "{gone:?}");
    assert_eq!(cgroups(id), [] as [PathBuf; 0]);
    assert_eq!(left(&containers), [] as [String; 0]);
}

#[test]
fn state_and_list_are_what_callers_parse() {
    let containers = Containers::new();
    let session = &containers.session;
    let id = &unique("shown");
    let bundle = containers.bundle("bundle", &["busybox"]);
    configure(&bundle, |config| {
        config["annotations"] = json!({ "a.b": "c" })
    });
    let pid = containers.start(id, &bundle);

    let state = session.run(&["state", id]).report;
    assert_eq!(state["id"], json!(id));
    assert_eq!(state["pid"], json!(pid));
    assert_eq!(state["status"], "running");
    assert_eq!(state["bundle"], text(&bundle));
    assert_eq!(state["rootfs"], text(&bundle.join("rootfs")));
    assert_eq!(state["annotations"], json!({ "a.b": "c" }));
    assert!(state["ociVersion"].as_str().unwrap().starts_with("1."));
    assert!(state["created"].as_str().unwrap().ends_with('Z'));

    assert_eq!(session.run(&["list", "-q"]).out, format!("{id}\n"));
    let list = session.run(&["list", "--format", "json"]).report;
    assert_eq!(list[0], state);
    let table = session.run(&["list"]).out;
    let rows: Vec<Vec<&str>> = table
        .lines()
        .map(|line| line.split_whitespace().collect())
        .collect();
    assert_eq!(
        rows[0],
        ["ID", "PID", "STATUS", "BUNDLE", "CREATED", "OWNER"]
    );
    assert_eq!(rows[1][..3], [id, pid.to_string().as_str(), "running"]);
    session
        .run(&["list", "--format", "xml"])
        .expect(USAGE, "list --format xml");

    let pids = session.run(&["ps", "--format", "json", id]).report;
    assert!(pids.as_array().unwrap().contains(&json!(pid)), "{pids}");
    let table = session.run(&["ps", id]).expect(DONE, "ps").out;
    assert!(table.lines().next().unwrap().contains("PID"), "{table}");
    assert!(table.contains(&pid.to_string()), "{table}");
}

#[test]
fn a_program_that_exits_at_once_never_hangs_its_run() {
    let containers = Containers::new();
    let bundle = containers.script("bundle", "exit 3");
    let id = &unique("early");
    for _ in 0..100 {
        let ran = containers
            .session
            .run(&["run", "--bundle", text(&bundle), id]);
        ran.expect(3, "run");
    }
    assert_eq!(cgroups(id), [] as [PathBuf; 0]);
    assert_eq!(left(&containers), [] as [String; 0]);
}

#[test]
fn what_the_caller_had_set_does_not_reach_the_program() {
    let containers = Containers::new();
    let script = "umask; grep SigIgn /proc/self/status >/ignored; exit 5";
    let bundle = containers.script("bundle", script);
    // With SIGCHLD ignored the kernel would reap the program before anybody has seen its exit status.
    let odd =
        "import os, signal, sys; signal.signal(signal.SIGCHLD, signal.SIG_IGN); os.umask(0o777)
os.execv(sys.argv[1], sys.argv[1:])";
    let mut command = Command::new("python3");
    command
        .args(["-c", odd, env!("CARGO_BIN_EXE_snapback"), "--root"])
        .arg(containers.session.root())
        .args(["run", "--bundle", text(&bundle), &unique("odd")]);
    assert_eq!(finish(command).expect(5, "run").out, "0022\n");
    let ignored = fs::read_to_string(bundle.join("rootfs/ignored")).unwrap();
    let ignored = u64::from_str_radix(ignored.split_whitespace().nth(1).unwrap(), 16).unwrap();
    assert_eq!(ignored & 1 << (Signal::SIGCHLD as i32 - 1), 0);
}

#[test]
fn signals_to_a_run_reach_the_program_and_its_end_is_told() {
    let containers = Containers::new();
    let script = "trap 'touch /usr1' USR1; trap 'exit 7' TERM; touch /ready; while :; do sleep 1 & wait $!; done";
    let bundle = containers.script("bundle", script);
    let id = &unique("signals");
    for (last, status) in [(Signal::SIGTERM, Some(7)), (Signal::SIGKILL, None)] {
        let ready = bundle.join("rootfs/ready");
        let _ = fs::remove_file(&ready);
        let mut command = containers.session.command();
        let mut run = command
            .args(["run", "--bundle", text(&bundle), id])
            .spawn()
            .unwrap();
        wait::until("the program runs", || ready.exists());
        let pid = Pid::from_raw(run.id().cast_signed());
        kill(pid, Signal::SIGUSR1).unwrap();
        wait::until("SIGUSR1 came through", || {
            bundle.join("rootfs/usr1").exists()
        });
        match status {
            Some(_) => kill(pid, last).unwrap(),
            None => drop(
                containers
                    .session
                    .run(&["kill", id, "KILL"])
                    .expect(DONE, "kill"),
            ),
        }
        let ended = run.wait().unwrap();
        assert_eq!(
            ended.code(),
            status.or(Some(128 + last as i32)),
            "{:?}",
            ended.signal()
        );
    }
    assert_eq!(left(&containers), [] as [String; 0]);
}

#[test]
fn dev_null_can_be_written_and_signals_are_as_programs_expect() {
    let containers = Containers::new();
    let script = "echo out || exit 1; echo err >&2 || exit 2; exec grep -E 'Sig(Ign|Blk)' /proc/self/status >/signals";
    let bundle = containers.script("bundle", script);
    let mut command = containers.session.command();
    let status = command
        .args(["run", "--bundle", text(&bundle), &unique("null")])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .unwrap();
    assert_eq!(status.code(), Some(0));
    let signals = fs::read_to_string(bundle.join("rootfs/signals")).unwrap();
    let set = |name: &str| {
        let line = signals.lines().find(|line| line.starts_with(name)).unwrap();
        u64::from_str_radix(line.split_whitespace().nth(1).unwrap(), 16).unwrap()
    };
    assert_eq!(set("SigBlk"), 0);
    // Rust's start-up ignores it; others may be ignored by whoever runs the tests.
    assert_eq!(set("SigIgn") & 1 << (Signal::SIGPIPE as i32 - 1), 0);
}

#[test]
fn loopback_is_up_in_a_new_network() {
    let containers = Containers::new();
    let bundle = containers.script(
        "bundle",
        "cat /sys/class/net/lo/flags; ping -c 1 127.0.0.1 >/dev/null",
    );
    let ran = containers
        .session
        .run(&["run", "--bundle", text(&bundle), &unique("lo")]);
    assert_eq!(ran.expect(DONE, "run").out, "0x9\n");
}

#[test]
fn seccomp_holds_for_the_program_and_for_what_joins_it() {
    for privileges in [&[][..], &["--allow-new-privileges"][..]] {
        let containers = Containers::new();
        let session = &containers.session;
        let options = [&["busybox", "--seccomp"][..], privileges].concat();
        let bundle = containers.bundle("bundle", &options);
        let id = &unique(if privileges.is_empty() {
            "filtered"
        } else {
            "filtered-new"
        });
        let pid = containers.start(id, &bundle);
        assert_eq!(numbers::status_number(pid, "Seccomp"), Some(2));
        let bits = u64::from(privileges.is_empty());
        assert_eq!(numbers::status_number(pid, "NoNewPrivs"), Some(bits));

        let script =
            "grep -E '^(Seccomp|NoNewPrivs|CapEff|CapBnd):' /proc/self/status; unshare -U true";
        let joined = session.run(&["exec", id, "sh", "-c", script]);
        assert_ne!(joined.status, 0, "unshare is not filtered: {joined:?}");
        let own = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        for line in joined.out.lines() {
            assert!(
                own.contains(line),
                "{line} in exec, not so in the container:\n{own}"
            );
        }
        assert_eq!(joined.out.lines().count(), 4, "{joined:?}");
        session.run(&["exec", id, "true"]).expect(DONE, "exec");
    }
}

#[test]
fn exec_gives_the_programs_status_and_takes_its_surroundings() {
    let containers = Containers::new();
    let session = &containers.session;
    let id = &unique("exec");
    let bundle = containers.bundle("bundle", &["busybox", "--user", "12:34", "--env", "A=1"]);
    containers.start(id, &bundle);

    session
        .run(&["exec", id, "sh", "-c", "exit 9"])
        .expect(9, "exec");
    session
        .run(&["exec", id, "sh", "-c", "kill -9 $$"])
        .expect(137, "exec");
    let told = session.run(&[
        "exec",
        id,
        "sh",
        "-c",
        "echo $(id -u) $(id -g) $(pwd) $A $HOME",
    ]);
    assert_eq!(told.out, "12 34 / 1 /root\n");
    let told = session.run(&[
        "exec",
        "--user",
        "5:6",
        "--cwd",
        "/tmp",
        "--env",
        "A=2",
        "--env",
        "B=3",
        id,
        "sh",
        "-c",
        "echo $(id -u) $(id -g) $(pwd) $A $B",
    ]);
    assert_eq!(told.out, "5 6 /tmp 2 3\n");

    let process = session.scratch().join("process.json");
    let description = json!({
        "args": ["sh", "-c", "echo $X; id -u >/tmp/uid; sleep 100"], "cwd": "/tmp", "env": ["PATH=/bin", "X=y"],
        "user": { "uid": 7, "gid": 7 },
    });
    fs::write(&process, description.to_string()).unwrap();
    let pid_file = session.scratch().join("exec.pid");
    let arguments = [
        "exec",
        "--pid-file",
        text(&pid_file),
        "--process",
        text(&process),
        "--detach",
        id,
    ];
    let log = session.scratch().join("exec.log");
    containers
        .run_logged(&log, &arguments)
        .expect(DONE, "exec --detach");
    let pid: i32 = fs::read_to_string(&pid_file).unwrap().parse().unwrap();
    let pids = session.run(&["ps", "--format", "json", id]).report;
    assert!(pids.as_array().unwrap().contains(&json!(pid)), "{pids}");
    wait::until("it has written", || {
        fs::read_to_string(bundle.join("rootfs/tmp/uid")).is_ok_and(|uid| uid == "7\n")
    });
    assert_eq!(fs::read_to_string(&log).unwrap(), "y\n");

    let missing = session
        .run(&["exec", id, "missing"])
        .expect(NOT_STARTED, "exec of nothing");
    assert!(
        missing.err.contains("executable file not found in $PATH"),
        "{missing:?}"
    );
    session
        .run(&["exec", &unique("nobody"), "true"])
        .expect(NOT_STARTED, "exec in nothing");
    session
        .run(&["exec", id])
        .expect(USAGE, "exec without a command");
    let names = fs::read_dir(session.root().join(id)).unwrap().flatten();
    let mut names = names.map(|entry| entry.file_name().to_string_lossy().into_owned());
    assert_eq!(names.find(|name| name.starts_with("exec-")), None);

    // What becomes of the bundle does not matter to a container that is there.
    fs::remove_file(bundle.join("config.json")).unwrap();
    session
        .run(&["exec", id, "true"])
        .expect(DONE, "exec without the bundle's config.json");
}

#[test]
fn failed_starts_leave_nothing_behind() {
    let containers = Containers::new();
    let session = &containers.session;
    let id = &unique("failed");
    let pid = containers.start(id, &containers.bundle("bundle", &["busybox"]));
    let bad = containers.bundle("bad", &["busybox", "--", "missing"]);
    let bad_id = &unique("failed-create");
    // Orphans come to a subreaper, which shows what was left unreaped.
    let subreaper = "
import ctypes, os, subprocess, sys
ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)
command = sys.argv[1:sys.argv.index('--')]
for arguments, status in (sys.argv[sys.argv.index('--') + 1].split(), 255), (sys.argv[-1].split(), 1):
    for _ in range(10):
        ran = subprocess.run(command + arguments, stdin=subprocess.DEVNULL, capture_output=True)
        assert ran.returncode == status, ran
try:
    sys.exit(f'left behind: {os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)}')
except ChildProcessError:
    pass
";
    let mut command = Command::new("python3");
    command
        .args(["-c", subreaper, env!("CARGO_BIN_EXE_snapback"), "--root"])
        .arg(session.root())
        .args([
            "--",
            &format!("exec {id} missing"),
            &format!("create --bundle {} {bad_id}", text(&bad)),
        ]);
    finish(command).expect(DONE, "failing ten times each");
    assert_eq!(left(&containers), [id.as_str()]);
    assert_eq!(cgroups(bad_id), [] as [PathBuf; 0]);
    let inside = numbers::processes()
        .into_values()
        .filter(|stat| stat.parent == pid && stat.state == 'Z');
    assert_eq!(inside.count(), 0);
    session
        .run(&["delete", "--force", id])
        .expect(DONE, "delete --force");
    assert_eq!(cgroups(id), [] as [PathBuf; 0]);
}

#[test]
fn a_paused_container_stands_still_and_can_be_ended() {
    let containers = Containers::new();
    let session = &containers.session;
    let id = &unique("paused");
    let bundle = containers.script(
        "bundle",
        "i=0; while :; do i=$((i+1)); echo $i >/count; done",
    );
    let count = || fs::read_to_string(bundle.join("rootfs/count")).unwrap_or_default();
    let pid = containers.start(id, &bundle);
    wait::until("it counts", || !count().is_empty());
    session
        .run(&["resume", id])
        .expect(ERROR, "resume of one that runs");

    session.run(&["pause", id]).expect(DONE, "pause");
    assert_eq!(containers.status(id), "paused");
    let frozen = cgroups(id).into_iter().any(|cgroup| {
        let holds = |file: &str, text: &str| {
            fs::read_to_string(cgroup.join(file)).is_ok_and(|content| content.contains(text))
        };
        holds("freezer.state", "FROZEN") || holds("cgroup.events", "frozen 1")
    });
    assert!(frozen, "no cgroup of {:?} is frozen", cgroups(id));
    session.run(&["pause", id]).expect(ERROR, "pause again");
    session
        .run(&["exec", id, "true"])
        .expect(NOT_STARTED, "exec in a paused one");
    session
        .run(&["kill", id, "USR2"])
        .expect(DONE, "kill with another signal");
    assert_eq!(containers.status(id), "paused");

    let stopped = count();
    session.run(&["resume", id]).expect(DONE, "resume");
    wait::until("USR2 has ended it, or it counts on", || {
        count() != stopped || !numbers::is_alive(pid)
    });

    let other = &unique("paused-killed");
    let pid = containers.start(other, &bundle);
    session.run(&["pause", other]).expect(DONE, "pause");
    session.run(&["kill", other, "KILL"]).expect(DONE, "kill");
    wait::until("the paused one is dead", || !numbers::is_alive(pid));

    let third = &unique("paused-deleted");
    let pid = containers.start(third, &bundle);
    session.run(&["pause", third]).expect(DONE, "pause");
    session
        .run(&["delete", "--force", third])
        .expect(DONE, "delete --force");
    assert!(!numbers::is_alive(pid));
    assert_eq!(cgroups(third), [] as [PathBuf; 0]);
}

#[test]
fn delete_force_ends_all_processes_also_without_a_pid_namespace() {
    let containers = Containers::new();
    let session = &containers.session;
    for options in [&["busybox"][..], &["busybox", "--host-pid"][..]] {
        let id = &unique(&format!("ended-{}", options.len()));
        let script = [
            "--",
            "sh",
            "-c",
            "sleep 1000 & sleep 1000 & touch /ready; wait",
        ];
        let bundle = containers.bundle(id, &[options, &script[..]].concat());
        containers.start(id, &bundle);
        wait::until("all its processes run", || {
            bundle.join("rootfs/ready").exists()
        });
        let mut pids: Vec<i32> = Vec::new();
        wait::until("the one that has told so has ended", || {
            let listed = session.run(&["ps", "--format", "json", id]).report;
            pids = serde_json::from_value(listed).unwrap();
            pids.len() == 3
        });
        session
            .run(&["delete", "--force", id])
            .expect(DONE, "delete --force");
        assert!(!pids.iter().any(|pid| numbers::is_alive(*pid)), "{pids:?}");
        assert_eq!(cgroups(id), [] as [PathBuf; 0]);
        session
            .run(&["delete", "--force", id])
            .expect(DONE, "delete --force of nothing");
        session
            .run(&["delete", id])
            .expect(ERROR, "delete of nothing");
    }
}

#[test]
fn a_container_with_a_checkpoint_can_be_ended_like_any_other() {
    let containers = Containers::new();
    let session = &containers.session;
    let bundle = containers.script("bundle", "sleep 1000 & sleep 1000; wait");
    // The copies that a checkpoint keeps are in the container's PID namespace, which ends only without them.
    for end in [&["delete", "--force"][..], &["kill"]] {
        let id = &unique(&format!("kept-{}", end[0]));
        let pid = containers.start_with_layer(id, &bundle);
        session.run(&["checkpoint", id]).expect(DONE, "checkpoint");
        let ended = match end {
            ["kill"] => session.run(&["kill", id, "KILL"]),
            _ => session.run(&[end, &[id]].concat()),
        };
        ended.expect(DONE, end[0]);
        wait::until("it is dead", || !numbers::is_alive(pid));
        session
            .run(&["delete", "--force", id])
            .expect(DONE, "delete --force");
        assert_eq!(cgroups(id), [] as [PathBuf; 0]);
        wait::until("its keeper has ended", || session.keepers().is_empty());
    }
}

#[test]
fn a_terminal_is_made_in_the_foreground() {
    let containers = Containers::new();
    let script = "test -t 0 && test -t 1 && test -t 2 && read line && echo got $line && exit 4";
    let bundle = containers.bundle(
        "bundle",
        &["busybox", "--terminal", "--", "sh", "-c", script],
    );
    let input = containers.session.scratch().join("input");
    fs::write(&input, "hello\n").unwrap();
    let mut command = containers.session.command();
    command
        .args(["run", "--bundle", text(&bundle), &unique("tty")])
        .stdin(File::open(input).unwrap());
    let ran = finish(command).expect(4, "run");
    assert!(ran.out.contains("got hello"), "{ran:?}");

    let id = &unique("tty-exec");
    containers.start(id, &containers.bundle("plain", &["busybox"]));
    let ran = containers
        .session
        .run(&["exec", "--tty", id, "sh", "-c", "test -t 1 && echo yes"]);
    assert!(ran.expect(DONE, "exec --tty").out.contains("yes"));
    let refused = containers.session.run(&[
        "run",
        "--detach",
        "--bundle",
        text(&bundle),
        &unique("tty-none"),
    ]);
    refused.expect(ERROR, "run --detach with a terminal and no socket for it");
    assert_eq!(left(&containers), [id.as_str()]);
}

#[test]
fn bad_input_is_told_and_changes_nothing() {
    let containers = Containers::new();
    let session = &containers.session;
    let bundle = containers.bundle("bundle", &["busybox", "--", "true"]);
    for id in ["", ".", "..", "a/b", "../x", "a b"] {
        session.run(&["state", id]).expect(
            if id.is_empty() { USAGE } else { ERROR },
            "state of a bad ID",
        );
    }
    let id = &unique("bad");
    for verb in ["state", "start", "kill", "pause", "resume", "ps", "delete"] {
        let told = session.run(&[verb, id]).expect(ERROR, verb);
        assert!(told.err.contains("does not exist"), "{told:?}");
    }
    session.run(&["nonsense"]).expect(USAGE, "an unknown verb");
    session
        .run(&["kill", id, "SIGNONE"])
        .expect(USAGE, "an unknown signal");
    session
        .run(&["--systemd-cgroup", "list"])
        .expect(ERROR, "--systemd-cgroup");
    let missing = session.scratch().join("missing");
    session
        .run(&["create", "--bundle", text(&missing), id])
        .expect(ERROR, "a missing bundle");
    configure(&bundle, |config| {
        config["linux"]["cgroupsPath"] = json!("/../outside")
    });
    session
        .run(&["create", "--bundle", text(&bundle), id])
        .expect(ERROR, "a cgroup outside");
    fs::write(bundle.join("config.json"), "{").unwrap();
    session
        .run(&["create", "--bundle", text(&bundle), id])
        .expect(ERROR, "a bad config.json");

    // Callers as podman read the reason from the log.
    let log = session.scratch().join("log.json");
    session
        .run(&["--log-format=json", "--log", text(&log), "start", id])
        .expect(ERROR, "start");
    let line: Value = serde_json::from_slice(&fs::read(&log).unwrap()).unwrap();
    assert_eq!(line["level"], "error");
    assert!(
        line["msg"].as_str().unwrap().contains("does not exist"),
        "{line}"
    );

    let file = session.scratch().join("file");
    fs::write(&file, "").unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_snapback"));
    let good = containers.bundle("good", &["busybox", "--", "true"]);
    command
        .arg("--root")
        .arg(file.join("root"))
        .args(["create", "--bundle", text(&good), id]);
    finish(command).expect(ERROR, "a root directory that can't be made");
    assert_eq!(cgroups(id), [] as [PathBuf; 0]);
}

#[test]
fn the_log_is_not_mixed_with_what_the_program_says() {
    let containers = Containers::new();
    let session = &containers.session;
    let bundle = containers.script("bundle", "echo out; echo err >&2");
    let id = &unique("log");
    let quiet = session
        .run(&["run", "--bundle", text(&bundle), id])
        .expect(DONE, "run");
    assert_eq!((quiet.out.as_str(), quiet.err.as_str()), ("out\n", "err\n"));
    let log = session.scratch().join("log");
    let logged = session.run(&[
        "--debug",
        "--log",
        text(&log),
        "run",
        "--bundle",
        text(&bundle),
        id,
    ]);
    assert_eq!(logged.expect(DONE, "run --debug --log").err, "err\n");
    let lines = fs::read_to_string(&log).unwrap();
    assert!(
        lines.lines().count() > 10 && lines.lines().all(|line| line.starts_with("time=")),
        "{lines}"
    );
    let told = session
        .run(&["--debug", "run", "--bundle", text(&bundle), id])
        .expect(DONE, "run --debug");
    assert!(!told.err.contains("executing workload"), "{}", told.err);
}

#[test]
fn a_closed_output_is_no_panic() {
    let containers = Containers::new();
    let (reader, writer) = nix::unistd::pipe().unwrap();
    drop::<OwnedFd>(reader);
    for arguments in [
        &["features"][..],
        &["list"],
        &["--help"],
        &["--version"],
        &["nonsense"],
        &["state", "none"],
    ] {
        let mut command = containers.session.command();
        let output = command
            .args(arguments)
            .stdout(writer.try_clone().unwrap())
            .stderr(writer.try_clone().unwrap())
            .status()
            .unwrap();
        assert!(
            output.code().is_some_and(|code| code < 3),
            "{arguments:?}: {output}"
        );
    }
}

#[test]
fn of_two_creations_at_once_one_wins() {
    let containers = Containers::new();
    let bundle = containers.bundle("bundle", &["busybox"]);
    let id = &unique("race");
    let start = |_| {
        let mut command = containers.session.command();
        command
            .args(["create", "--bundle", text(&bundle), id])
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        command.spawn().unwrap()
    };
    let racers: Vec<_> = (0..4).map(start).collect();
    let mut ended: Vec<_> = racers
        .into_iter()
        .map(|mut racer| racer.wait().unwrap().code())
        .collect();
    ended.sort();
    assert_eq!(ended, [Some(DONE), Some(ERROR), Some(ERROR), Some(ERROR)]);
    assert_eq!(containers.status(id), "created");
    containers.session.run(&["start", id]).expect(DONE, "start");
}

#[test]
fn a_creation_that_is_interrupted_leaves_nothing() {
    let containers = Containers::new();
    let bundle = containers.bundle("bundle", &["busybox"]);
    let hooked = containers.session.scratch().join("hooked");
    let script = format!(
        "touch {0}; while [ -e {0} ]; do sleep 0.01; done",
        hooked.display()
    );
    configure(&bundle, |config| {
        config["hooks"] =
            json!({ "createRuntime": [{ "path": "/bin/sh", "args": ["sh", "-c", script] }] });
    });
    let id = &unique("interrupted");
    for verb in [&["create"][..], &["run", "--detach"]] {
        let mut command = containers.session.command();
        command
            .args(verb)
            .args(["--bundle", text(&bundle), id])
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        let mut creation = command.spawn().unwrap();
        wait::until("the hook runs", || hooked.exists());
        kill(Pid::from_raw(creation.id().cast_signed()), Signal::SIGINT).unwrap();
        fs::remove_file(&hooked).unwrap();
        assert_eq!(
            creation.wait().unwrap().code(),
            Some(128 + Signal::SIGINT as i32)
        );
        assert_eq!(left(&containers), [] as [String; 0]);
        assert_eq!(cgroups(id), [] as [PathBuf; 0]);
    }
}

#[test]
fn hooks_see_the_container() {
    let containers = Containers::new();
    let bundle = containers.script("bundle", "true");
    let seen = containers.session.scratch().join("seen");
    let hook = |name: &str| {
        let file = seen.with_extension(name);
        json!([{ "path": "/bin/sh", "args": ["sh", "-c", format!("cat >{}", file.display())] }])
    };
    configure(&bundle, |config| {
        config["hooks"] = json!({ "createRuntime": hook("create"), "poststop": hook("stop") });
    });
    let id = &unique("hooks");
    containers
        .session
        .run(&["run", "--bundle", text(&bundle), id])
        .expect(DONE, "run");
    for name in ["create", "stop"] {
        let state: Value =
            serde_json::from_slice(&fs::read(seen.with_extension(name)).unwrap()).unwrap();
        assert_eq!(state["id"], json!(id));
        if name == "stop" {
            assert_eq!(state["bundle"], text(&bundle));
        }
    }
}

#[test]
fn a_tmpfs_starts_with_what_it_covers_if_asked_for() {
    let containers = Containers::new();
    let script = "cat /var/link/file && echo new >/var/link/file";
    let bundle = containers.script("bundle", script);
    let below = bundle.join("rootfs/var/covered");
    fs::create_dir(&below).unwrap();
    fs::write(below.join("file"), "old\n").unwrap();
    // Absolute, and to be followed inside the container only.
    std::os::unix::fs::symlink("/var/covered", bundle.join("rootfs/var/link")).unwrap();
    configure(&bundle, |config| {
        let mounts = config["mounts"].as_array_mut().unwrap();
        mounts.push(json!({
            "destination": "/var/link", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "tmpcopyup"],
        }));
    });
    let ran = containers
        .session
        .run(&["run", "--bundle", text(&bundle), &unique("copy-up")]);
    assert_eq!(ran.expect(DONE, "run").out, "old\n");
    assert_eq!(fs::read_to_string(below.join("file")).unwrap(), "old\n");
}

#[test]
fn spec_and_features_are_valid() {
    let containers = Containers::new();
    let session = &containers.session;
    let directory = session.scratch();
    session
        .run(&["spec", "--bundle", text(directory)])
        .expect(DONE, "spec");
    let config: Value =
        serde_json::from_slice(&fs::read(directory.join("config.json")).unwrap()).unwrap();
    assert_eq!(config["process"]["args"], json!(["sh"]));
    session
        .run(&["spec", "--bundle", text(directory)])
        .expect(ERROR, "spec over an old one");
    let features = session.run(&["features"]).expect(DONE, "features").report;
    assert_eq!(features["linux"]["seccomp"]["enabled"], json!(true));
    let version = session.run(&["--version"]).expect(DONE, "--version").out;
    assert!(version.starts_with("snapback version "), "{version}");
}
