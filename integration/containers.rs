//! Fixture programs as the init of containers, confined as those are: processes and threads are made again there, without
//! a privilege that the container lacks.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::support::container::{Containers, unique};
use crate::support::fixture::{Fixture, build_directory, real};
use crate::support::session::{Answer, DONE, REFUSED, Session};
use crate::support::{numbers, skip, wait};

/// What processes that end are shown with.
pub(crate) const PROGRAMS: &[&str] = &[
    "child_exits",
    "child_execs",
    "child_family",
    "child_memory",
    "child_program",
    "child_threads",
    "thread_exits",
    "zombie_child",
];

/// A bundle that runs a fixture program, in a directory that it can write to.
#[track_caller]
pub(crate) fn bundle(containers: &Containers, program: &str, options: &[&str]) -> PathBuf {
    let programs = build_directory().display();
    let mount = format!("{programs}:/fixtures:ro");
    let path = format!("/fixtures/{program}");
    let fixed = ["host", "--mount", &mount, "--cwd", "/tmp"];
    let all = [&fixed[..], options, &["--", &path]].concat();
    let open = std::fs::Permissions::from_mode(0o711);
    std::fs::set_permissions(containers.session.scratch(), open).expect("chmod");
    containers.bundle(program, &all)
}

/// A runtime in the foreground, so that the program's commands and answers pass.
pub(crate) fn ours(session: &Session, bundle: &Path, id: &str) -> Command {
    let mut command = session.command();
    command.arg("run").arg("--bundle").arg(bundle).arg(id);
    command
}

fn runcs(session: &Session, bundle: &Path, id: &str) -> Command {
    let mut command = Command::new("runc");
    let root = session.scratch().join("runc");
    command.arg("--root").arg(root).arg("run");
    command.arg("--bundle").arg(bundle).arg(id);
    command
}

/// The PID of a program's init: the child of the runtime, or the one below.
pub(crate) fn init_of(runtime: i32, program: &str) -> Option<i32> {
    let all = numbers::processes();
    let below = |pid: i32| {
        let mut current = pid;
        while let Some(stat) = all.get(&current) {
            if stat.parent == runtime {
                return true;
            }
            current = stat.parent;
        }
        false
    };
    let short = &program[..program.len().min(15)];
    let name = |pid: i32| std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    let is_it = |pid: &i32| below(*pid) && name(*pid).trim() == short;
    let parent_is_not = |pid: &i32| name(all[pid].parent).trim() != short;
    let mut found = all
        .keys()
        .copied()
        .filter(|pid| is_it(pid) && parent_is_not(pid));
    found.next()
}

type Runtime = fn(&Session, &Path, &str) -> Command;

/// Every program: wrecked and rolled back twice.
#[track_caller]
fn come_back(runtime: Runtime, options: &[&str]) {
    for program in PROGRAMS {
        let containers = Containers::new();
        let session = &containers.session;
        let bundle = bundle(&containers, program, options);
        let id = unique(&format!("{program}{}", options.concat().replace(':', ".")));
        let mut fixture = Fixture::launch(program, runtime(session, &bundle, &id));
        let init = init_of(fixture.pid(), program).expect("an init");
        let target = ["--pid", &init.to_string()];
        let run = |arguments: &[&str]| -> Answer {
            let all = [arguments, &target[..]].concat();
            let what = format!("{program} {options:?}: {}", arguments[0]);
            session.run(&all).expect(DONE, &what)
        };
        run(&["checkpoint", "--no-files", "--json"]);
        for round in 0..2 {
            fixture.verify("before it is wrecked");
            fixture.mutate();
            let answer = run(&["rollback", "--verify", "--json"]);
            assert_eq!(answer.text("outcome"), "rolled_back", "{answer:#?}");
            assert!(answer.number("revived") >= 1, "{program}: {answer:#?}");
            fixture.verify(&format!("after rollback {round}, {options:?}"));
            fixture.run_on();
        }
        run(&["release", "--all"]);
        fixture.verify("after the release");
        // The runtime is told of the end as always.
        fixture.send(b"q");
        wait::until("the runtime has ended", || {
            matches!(fixture.family.child.try_wait(), Ok(Some(_)))
        });
        let status = fixture.family.child.wait().expect("its status");
        assert!(status.success(), "{program}: {status}");
    }
}

#[test]
fn with_a_seccomp_profile() {
    come_back(ours, &["--seccomp"]);
}

#[test]
fn as_another_user() {
    come_back(ours, &["--seccomp", "--user", "1000:1000"]);
}

#[test]
fn with_a_read_only_root() {
    come_back(ours, &["--read-only", "--allow-new-privileges"]);
}

#[test]
fn in_a_user_namespace() {
    come_back(ours, &["--user-namespace"]);
}

#[test]
fn as_another_user_of_a_user_namespace() {
    come_back(ours, &["--user-namespace", "--user", "1000:1000"]);
}

#[test]
fn of_runc() {
    if !Path::new("/usr/sbin/runc").exists() {
        skip!("no runc");
    }
    come_back(runcs, &["--seccomp"]);
}

#[test]
fn of_runc_in_a_user_namespace() {
    if !Path::new("/usr/sbin/runc").exists() {
        skip!("no runc");
    }
    come_back(
        runcs,
        &["--seccomp", "--user-namespace", "--user", "1000:1000"],
    );
}

/// The file that limits the processes of a container.
fn process_limit(init: i32) -> PathBuf {
    let text = std::fs::read_to_string(format!("/proc/{init}/cgroup")).expect("cgroup");
    let paths = text.lines().filter_map(|line| line.splitn(3, ':').nth(2));
    let files = paths.flat_map(|path| {
        ["/sys/fs/cgroup/pids", "/sys/fs/cgroup"]
            .map(|top| PathBuf::from(format!("{top}{path}/pids.max")))
    });
    let mut found = files.filter(|file| file.exists());
    found.next().expect("a limit of processes")
}

/// A limit that leaves no room: for shadows no checkpoint is taken, for a process that is to be made again there is no
/// rollback, and nothing is touched.
#[test]
fn where_its_process_limit_is_reached() {
    let containers = Containers::new();
    let session = &containers.session;
    let id = &unique("limit");
    let bundle = bundle(&containers, "child_exits", &[]);
    let config = bundle.join("config.json");
    let text = std::fs::read_to_string(&config).expect("config.json");
    let mut value: serde_json::Value = serde_json::from_str(&text).expect("JSON");
    value["linux"]["resources"]["pids"] = serde_json::json!({ "limit": 1000 });
    std::fs::write(&config, value.to_string()).expect("writing config.json");
    let mut fixture = Fixture::launch("child_exits", ours(session, &bundle, id));
    let init = init_of(fixture.pid(), "child_exits").expect("an init");
    let limit = process_limit(init);
    let current = limit.with_file_name("pids.current");
    let fill = || {
        let now = std::fs::read_to_string(&current).expect("pids.current");
        std::fs::write(&limit, now).expect("pids.max");
    };
    let free = || std::fs::write(&limit, "1000").expect("pids.max");
    let is_named = |answer: &Answer, what: &str| {
        assert!(
            answer.report["refused"].to_string().contains(what),
            "{answer:#?}"
        );
    };

    fill();
    let refused = session
        .run(&["checkpoint", "--no-files", "--json", id])
        .expect(REFUSED, "checkpoint");
    is_named(&refused, "process limit");
    fixture.verify("after a refused checkpoint");
    free();
    session
        .run(&["checkpoint", "--no-files", "--json", id])
        .expect(DONE, "checkpoint");
    for _ in 0..2 {
        fixture.mutate();
        let wrecked = fixture.ask(b'v');
        fill();
        let back = || session.run(&["rollback", "--verify", "--json", id]);
        is_named(&back().expect(REFUSED, "rollback"), "pids.max");
        assert_eq!(
            fixture.ask(b'v'),
            wrecked,
            "a refused rollback changed something"
        );
        free();
        back().expect(DONE, "rollback");
        fixture.verify("after the rollback");
    }
}

/// Rollbacks of the container of several services.
const ROUNDS: u64 = 10;

/// Redis, nginx, an SSH server and a session with a terminal on it, started by an init that is none of them.
#[test]
fn of_several_services() {
    for program in ["redis-server", "nginx", "dropbear", "dbclient"] {
        let is_there = |directory: &&str| Path::new(directory).join(program).exists();
        if !["/usr/bin", "/usr/sbin"].iter().any(is_there) {
            skip!("no {program}");
        }
    }
    let containers = Containers::new();
    let session = &containers.session;
    let id = &unique("services");
    let programs = real("");
    let mount = format!("{}:/real:ro", programs.display());
    let program = ["--", "python3", "/real/services.py"];
    let all = [&["host", "--seccomp", "--mount", &mount][..], &program].concat();
    let bundle = containers.bundle("services", &all);
    let mut services = Fixture::launch("services.py", ours(session, &bundle, id));
    services.verify("before the checkpoint");
    session
        .run(&["checkpoint", "--no-files", "--json", id])
        .expect(DONE, "checkpoint");
    for round in 0..ROUNDS {
        services.run_on();
        services.verify("in use");
        // While it is used, and after the interesting part has died.
        if round % 3 != 2 {
            services.mutate();
        }
        let answer = session.run(&["rollback", "--verify", "--json", id]);
        answer.expect(DONE, "rollback");
        services.verify(&format!("after rollback {round}"));
    }
    session
        .run(&["release", "--all", id])
        .expect(DONE, "release");
    services.run_on();
    services.verify("after the release");
}

/// A process that has joined the container has its parent outside: it comes back where it is, with its children made
/// again, and is made by its shadow should it have ended itself.
#[test]
fn a_process_that_joined() {
    let containers = Containers::new();
    let session = &containers.session;
    let id = &unique("joined");
    let bundle = bundle(&containers, "child_exits", &["--seccomp"]);
    let config = bundle.join("config.json");
    let text = std::fs::read_to_string(&config).expect("config.json");
    let mut value: serde_json::Value = serde_json::from_str(&text).expect("JSON");
    value["process"]["args"] = serde_json::json!(["sleep", "1000"]);
    std::fs::write(&config, value.to_string()).expect("writing config.json");
    let init = containers.start(id, &bundle);
    let mut exec = session.command();
    exec.args(["exec", id, "/fixtures/child_exits"]);
    let mut fixture = Fixture::launch("child_exits", exec);
    let joined = init_of(fixture.pid(), "child_exits").expect("a process");

    session
        .run(&["checkpoint", "--no-files", "--json", id])
        .expect(DONE, "checkpoint");
    let back = || session.run(&["rollback", "--verify", "--json", id]);
    for _ in 0..2 {
        fixture.mutate();
        let mut other = session.command();
        other.args(["exec", id, "/fixtures/child_exits"]);
        let mut other = Fixture::launch("child_exits", other);
        let answer = back().expect(DONE, "rollback");
        assert!(answer.number("revived") >= 1, "{answer:#?}");
        fixture.verify("after the rollback");
        fixture.run_on();
        // What has joined since is gone, and who waits for it is told.
        wait::until("the other exec has ended", || {
            matches!(other.family.child.try_wait(), Ok(Some(_)))
        });
    }
    kill(Pid::from_raw(joined), Signal::SIGKILL).expect("killing what has joined");
    wait::until("it is gone", || !numbers::is_alive(joined));
    // Made by its shadow: its parent, which is outside, has been told of its end.
    let answer = back().expect(DONE, "rollback");
    assert!(answer.number("revived") >= 1, "{answer:#?}");
    fixture.verify("after it was killed");
    fixture.run_on();
    assert!(numbers::is_alive(init));
    session
        .run(&["release", "--all", id])
        .expect(DONE, "release");
}
