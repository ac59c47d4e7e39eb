//! Containers that have ended, init and all, and are made again by a rollback.

use std::path::Path;

use snapback::fault;

use crate::containers::bundle;
use crate::restore::{come_back, confined_and_real, next, real_bundle, with_restorable};
use crate::support::container::{Containers, unique};
use crate::support::fixture::{Fixture, build_directory};
use crate::support::redis;
use crate::support::session::{Answer, DONE, ERROR, REFUSED};
use crate::support::{numbers, skip, wait};

/// A fixture program as the init of a container that runs by itself.
struct Container {
    containers: Containers,
    id: String,
    fixture: Fixture,
    /// For `checkpoint`.
    files: &'static [&'static str],
}

impl Container {
    #[track_caller]
    fn of(program: &str, options: &[&str]) -> Self {
        let containers = Containers::new();
        let bundle = bundle(&containers, program, options);
        // An overlay that is mounted outside of a user namespace can't be bound in there.
        Self::start(
            containers,
            program,
            &bundle,
            !options.contains(&"--user-namespace"),
        )
    }

    #[track_caller]
    fn start(containers: Containers, program: &str, bundle: &Path, with_files: bool) -> Self {
        let (layer, files): (&[&str], &[&str]) = match with_files {
            true => (&["--overlay"], &[]),
            false => (&[], &["--no-files"]),
        };
        let id = unique(&format!("again-{program}-{}", next()));
        let mut command = containers.session.command();
        command.args(["run", "--detach"]).args(layer);
        command.arg("--bundle").arg(bundle);
        command.arg("--pid-file");
        command
            .arg(containers.session.scratch().join("pid"))
            .arg(&id);
        let fixture = Fixture::launch(program, command);
        Self {
            containers,
            id,
            fixture,
            files,
        }
    }

    #[track_caller]
    fn run(&self, arguments: &[&str]) -> Answer {
        let all = [arguments, &[&self.id]].concat();
        self.containers.session.run(&all)
    }

    #[track_caller]
    fn done(&self, arguments: &[&str]) -> Answer {
        self.run(arguments).expect(DONE, arguments[0])
    }

    #[track_caller]
    fn checkpoint(&self, name: &str) {
        self.done(&[&["checkpoint", "--name", name], self.files].concat());
    }

    /// `rollback --verify`; the program finds all as it was.
    #[track_caller]
    fn back(&mut self, when: &str) {
        self.done(&["rollback", "--verify"]);
        self.fixture.verify(when);
    }

    /// Ends the init, by `SIGKILL` or by itself.
    #[track_caller]
    fn end(&mut self, by_itself: bool) {
        match by_itself {
            true => self.fixture.send(b"q"),
            false => drop(self.containers.session.run(&["kill", &self.id, "KILL"])),
        }
        self.has_ended();
    }

    #[track_caller]
    fn has_ended(&self) {
        wait::until("the container has stopped", || {
            self.containers.status(&self.id) == "stopped"
        });
    }

    /// `delete --force`; nothing is left then.
    #[track_caller]
    fn delete(&self) {
        self.done(&["delete", "--force"]);
        self.leaves_nothing();
    }

    /// No container, no keeper, no process, no cgroup, no file.
    #[track_caller]
    fn leaves_nothing(&self) {
        self.containers.leave_nothing(&self.id);
        let session = &self.containers.session;
        for above in [".", ".keepers", ".again", ".overlays", ".locks"] {
            let listed = std::fs::read_dir(session.root().join(above));
            let names = listed.into_iter().flatten().flatten();
            let names: Vec<_> = names.map(|entry| entry.file_name()).collect();
            let is_left = |name: &&std::ffi::OsString| *name != ".keepers" && *name != ".forks";
            let left: Vec<_> = names.iter().filter(is_left).collect();
            assert!(left.is_empty(), "left in {above}: {left:?}");
        }
    }
}

/// Killed and rolled back, changed and rolled back twice; ended by itself and rolled back, changed and rolled back.
#[track_caller]
fn comes_back_in(mut container: Container) {
    container.fixture.verify("before the checkpoint");
    container.checkpoint("default");
    container.fixture.mutate();
    for (by_itself, rollbacks) in [(false, 2), (true, 1)] {
        container.end(by_itself);
        container.back("after it was made again");
        for round in 0..rollbacks {
            container.fixture.run_on();
            container.fixture.mutate();
            container.back(&format!("after rollback {round}"));
        }
        container.fixture.run_on();
    }
    container.delete();
}

#[track_caller]
fn comes_back(program: &str, options: &[&str]) {
    comes_back_in(Container::of(program, options));
}

with_restorable!(come_back);
confined_and_real!();

/// A program of `fixtures/real`, run by this command line before its path.
#[track_caller]
fn real_comes_back(name: &str, command: &[&str]) {
    if !Path::new(command[0]).exists() {
        skip!("no {}", command[0]);
    }
    let containers = Containers::new();
    let bundle = real_bundle(&containers, name, command);
    comes_back_in(Container::start(containers, name, &bundle, true));
}

/// What the supervisor sees: another PID in the PID file and in the state, the same container otherwise; inside its PID is 1.
#[test]
fn the_supervisor_sees_a_running_container() {
    let mut container = Container::of("child_family", &[]);
    let state = |container: &Container| container.done(&["state"]).report;
    let before = state(&container);
    container.checkpoint("default");
    container.end(false);
    container.back("made again");
    let mut after = state(&container);
    let pid = container.containers.pid(&container.id);
    assert_ne!(before["pid"], after["pid"], "another process");
    let file = container.containers.session.scratch().join("pid");
    let written = std::fs::read_to_string(file).expect("the PID file");
    assert_eq!(written, pid.to_string());
    let inside = numbers::status_number(pid, "NSpid");
    assert_eq!(inside, Some(i64::from(pid).unsigned_abs()), "{pid}");
    for field in ["pid", "created"] {
        after[field] = before[field].clone();
    }
    assert_eq!(before, after);
    container.delete();
}

/// Checkpoints that the container was not made again of outlive it too, increments among them; to go back to one of a former
/// life the container has to end first.
#[test]
fn all_checkpoints_outlive_the_container() {
    let mut container = Container::of("search_tree", &[]);
    let marks = |container: &Container| {
        let listed = container.done(&["checkpoints", "--json"]).report;
        let list = listed["checkpoints"].as_array().cloned();
        let list = list.expect("a list").into_iter().map(|one| {
            let text = |field: &str| one[field].as_str().map(str::to_owned);
            (
                text("name").expect("a name"),
                text("parent"),
                one["ended"].as_bool().expect("ended"),
                one["current"].as_bool().expect("current"),
            )
        });
        list.collect::<Vec<_>>()
    };
    let row = |name: &str, parent: Option<&str>, ended, current| {
        (name.to_owned(), parent.map(str::to_owned), ended, current)
    };
    container.checkpoint("a");
    container.fixture.run_on();
    container.checkpoint("b");
    container.fixture.run_on();
    container.checkpoint("c");
    container.fixture.mutate();
    container.end(false);
    let all = [
        row("a", None, true, false),
        row("b", Some("a"), true, false),
        row("c", Some("b"), true, true),
    ];
    assert_eq!(marks(&container), all);
    let back = |container: &mut Container, name: &str| {
        container.done(&["rollback", "--verify", "--to", name]);
        container.fixture.verify(name);
    };
    back(&mut container, "b");
    let all = [
        row("a", None, true, false),
        row("b", Some("a"), false, true),
        row("c", Some("b"), true, false),
    ];
    assert_eq!(marks(&container), all);
    let refused = container.run(&["rollback", "--to", "a"]);
    let refused = refused.expect(REFUSED, "rollback to one of a former life");
    assert!(refused.err.contains("kill the container"), "{refused:#?}");
    container.fixture.run_on();
    container.checkpoint("d");
    container.fixture.mutate();
    for name in ["b", "d", "b"] {
        back(&mut container, name);
        container.fixture.mutate();
    }
    for name in ["a", "d", "c"] {
        container.end(false);
        back(&mut container, name);
        container.fixture.run_on();
    }
    container.done(&["release", "--name", "d"]);
    container.end(true);
    let gone = container.run(&["rollback", "--to", "d"]);
    assert!(gone.expect(ERROR, "rollback").err.contains("a, b, c"));
    back(&mut container, "b");
    container.done(&["release", "--all"]);
    container.fixture.verify("after the release");
    container.fixture.send(b"q");
    container.has_ended();
    container.run(&["rollback"]).expect(ERROR, "rollback");
    container.delete();
}

/// What can't be made of records alone is refused by name, the container is as stopped as before.
#[test]
fn what_cannot_be_made_is_refused() {
    for (program, object) in [
        ("inotify", "inotify"),
        ("stopped_child", "job control"),
        ("thread_credentials", "credentials"),
        ("aio", "AIO context"),
    ] {
        let mut container = Container::of(program, &[]);
        container.checkpoint("default");
        container.end(false);
        for _ in 0..2 {
            let answer = container.run(&["rollback"]);
            let answer = answer.expect(REFUSED, program);
            assert!(answer.err.contains(object), "{answer:#?}");
            container.has_ended();
        }
        container.delete();
    }
}

/// What is in RAM of a container that has ended can be looked at, written to disk, and made a second container of.
#[test]
fn an_ended_checkpoint_is_a_checkpoint() {
    let program = "child_family";
    let mut container = Container::of(program, &[]);
    container.checkpoint("default");
    container.fixture.mutate();
    container.end(false);
    let inspected = container.done(&["inspect"]);
    assert!(inspected.out.contains(program), "{inspected:#?}");
    let image = container.containers.session.scratch().join("image");
    let path = image.to_str().expect("a path in UTF-8").to_owned();
    container.done(&["persist", "--image-path", &path]);
    let second = unique(&format!("again-fork-{}", next()));
    let mut command = container.containers.session.command();
    command.args(["fork", "--overlay", "--verify", &container.id, &second]);
    let mut fork = Fixture::take_over(program, command);
    wait::until("the second container runs", || {
        let state = container.containers.session.run(&["state", &second]);
        state.out.contains("\"running\"")
    });
    fork.verify("in the second");
    fork.send(b"q");
    wait::until("the second container has ended", || {
        matches!(fork.family.child.try_wait(), Ok(Some(_)))
    });
    container.back("made again");
    container.delete();
    let restored = container.containers.run_logged(
        &image.with_extension("log"),
        &[
            "restore",
            "--verify",
            "--detach",
            "--overlay",
            "--image-path",
            &path,
            "--bundle",
            image.with_file_name(program).to_str().expect("a path"),
            &container.id,
        ],
    );
    restored.expect(DONE, "restore");
    container.delete();
}

/// `run` that stays and `run --keep`: the first deletes the container when it ends, and there is nothing to come back to.
#[test]
fn a_container_that_is_deleted_at_its_end_does_not_come_back() {
    let program = "brk_grow";
    for (options, status) in [(&[][..], None), (&["--keep"][..], Some("stopped"))] {
        let containers = Containers::new();
        let bundle = bundle(&containers, program, &[]);
        let id = unique(&format!("again-stays-{}", next()));
        let mut command = containers.session.command();
        command.arg("run").args(options).arg("--bundle");
        command.arg(bundle).arg(&id);
        let mut fixture = Fixture::launch(program, command);
        let run = |arguments: &[&str]| containers.session.run(&[arguments, &[&id]].concat());
        run(&["checkpoint", "--no-files"]).expect(DONE, "checkpoint");
        fixture.mutate();
        containers
            .session
            .run(&["kill", &id, "KILL"])
            .expect(DONE, "kill");
        wait::until("run has ended", || {
            matches!(fixture.family.child.try_wait(), Ok(Some(_)))
        });
        match status {
            None => {
                wait::until("the keeper has ended", || {
                    containers.session.keepers().is_empty()
                });
                run(&["rollback"]).expect(ERROR, "rollback");
            }
            Some(status) => {
                assert_eq!(containers.status(&id), status);
                run(&["rollback", "--verify"]).expect(DONE, "rollback");
                fixture.verify("made again");
                run(&["delete", "--force"]).expect(DONE, "delete");
            }
        }
    }
}

/// The keeper is killed at each point on the way: the container has ended, and can be deleted; or, once it was told to run, runs.
#[test]
fn a_killed_keeper_leaves_an_ended_container() {
    let of_keeper = |point: &&&str| point.starts_with("ended.") || point.starts_with("restore.");
    for point in fault::POINTS.iter().filter(of_keeper) {
        let mut container = Container::of("child_family", &[]);
        container.containers.session.set(fault::VARIABLE, point);
        container.checkpoint("default");
        container.containers.session.unset(fault::VARIABLE);
        container.fixture.mutate();
        container.end(false);
        let answer = container.run(&["rollback", "--verify"]);
        answer.expect(ERROR, point);
        container.has_ended();
        container.delete();
    }
}

/// The command is killed at each point on the way: the next one goes on or begins anew.
#[test]
fn a_killed_rollback_is_taken_up_again() {
    let of_command = |point: &&&str| point.starts_with("again.");
    for point in fault::POINTS.iter().filter(of_command) {
        for then in ["rollback", "delete"] {
            let mut container = Container::of("child_family", &[]);
            container.checkpoint("default");
            container.fixture.mutate();
            container.end(false);
            container.containers.session.set(fault::VARIABLE, point);
            // To a file: the init that waits has our standard output open.
            let log = container.containers.session.scratch().join("killed.log");
            let killed = ["rollback", "--verify", &container.id];
            let killed = container.containers.run_logged(&log, &killed);
            assert_ne!(killed.status, DONE, "{point} was not reached");
            container.containers.session.unset(fault::VARIABLE);
            if then == "rollback" {
                container.back(point);
                container.fixture.mutate();
                container.back(point);
            }
            container.delete();
        }
    }
}

/// Two at the same time make one container; the second rolls back what the first has made.
#[test]
fn rollbacks_at_the_same_time_make_one_container() {
    let mut container = Container::of("child_family", &[]);
    container.checkpoint("default");
    container.fixture.mutate();
    container.end(false);
    let mut commands: Vec<_> = (0..3)
        .map(|_| {
            let mut command = container.containers.session.command();
            command.args(["rollback", "--verify", &container.id]);
            command.spawn().expect("starting snapback")
        })
        .collect();
    for command in &mut commands {
        assert!(command.wait().expect("waiting").success());
    }
    container.fixture.verify("made again");
    container.delete();
}

/// What can't be made of a container that was created is told, the one that has ended is there, and made again when it can be.
#[test]
fn a_container_that_cannot_be_filled_is_still_the_one_that_ended() {
    let program = "brk_grow";
    let containers = Containers::new();
    let programs = containers.session.scratch().join("programs");
    let file = programs.join(program);
    std::fs::create_dir(&programs).expect("making a directory");
    std::fs::copy(build_directory().join(program), &file).expect("copying");
    let mount = format!("{}:/fixtures:ro", programs.display());
    let path = format!("/fixtures/{program}");
    let arguments = ["host", "--mount", &mount, "--cwd", "/tmp", "--", &path];
    let bundle = containers.bundle("bundle", &arguments);
    let mut container = Container::start(containers, program, &bundle, true);
    container.checkpoint("default");
    container.fixture.mutate();
    container.end(false);
    // Another file of that name, a byte longer.
    let away = file.with_extension("away");
    std::fs::rename(&file, &away).expect("taking the program away");
    std::fs::copy(&away, &file).expect("copying");
    let other = std::fs::File::options().append(true).open(&file);
    std::io::Write::write_all(&mut other.expect("opening it"), b"x").expect("writing");
    for _ in 0..2 {
        let answer = container.run(&["rollback"]).expect(ERROR, "rollback");
        assert!(answer.err.contains(&path), "{answer:#?}");
        container.has_ended();
    }
    std::fs::rename(&away, &file).expect("putting it back");
    container.back("made again");
    container.fixture.mutate();
    container.back("rolled back");
    container.delete();
}

/// A damaged bundle: no container, but the one that has ended is still there with its checkpoints.
#[test]
fn a_container_that_cannot_be_created_is_still_the_one_that_ended() {
    let mut container = Container::of("brk_grow", &[]);
    container.checkpoint("default");
    container.fixture.mutate();
    container.end(false);
    let config = container
        .containers
        .session
        .scratch()
        .join("brk_grow/config.json");
    let away = config.with_extension("away");
    std::fs::rename(&config, &away).expect("taking the configuration away");
    let answer = container.run(&["rollback"]).expect(ERROR, "rollback");
    assert!(answer.err.contains("config.json"), "{answer:#?}");
    container.has_ended();
    std::fs::rename(&away, &config).expect("putting it back");
    container.back("made again");
    container.delete();
}

/// Redis with some 100 MB, killed and by `SHUTDOWN`: the digest is that of the checkpoint.
#[test]
fn real_redis() {
    if !Path::new("/usr/bin/redis-server").exists() {
        skip!("no redis-server");
    }
    let containers = Containers::new();
    let bundle = containers.bundle("redis", &["redis", "--port", "0"]);
    let id = unique("again-redis");
    containers.start(&id, &bundle);
    let connect = || {
        let pid = containers.pid(&id);
        let socket = format!("/proc/{pid}/root/run/redis.sock");
        redis::Client::wait_for(Path::new(&socket))
    };
    let mut client = connect();
    let digest = redis::fill(&mut client);
    let run = |arguments: &[&str]| {
        let all = [arguments, &[&id]].concat();
        containers.session.run(&all).expect(DONE, arguments[0])
    };
    run(&["checkpoint", "--no-files"]);
    for end in ["SHUTDOWN NOSAVE", "DEBUG SEGFAULT"] {
        client.must("FLUSHALL");
        let _ = client.ask(end);
        wait::until("the container has stopped", || {
            containers.status(&id) == "stopped"
        });
        run(&["rollback", "--verify"]);
        client = connect();
        for _ in 0..2 {
            assert_eq!(client.must("DEBUG DIGEST"), digest, "{end}");
            client.must("FLUSHALL");
            run(&["rollback", "--verify"]);
            client = connect();
        }
    }
}
