//! PostgreSQL in a container, its files in the writable layer or in a volume: rolled back under load, checked by its
//! own tools, and started again from the files alone.

use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use crate::file_programs::rounds;
use crate::postgresql::{Client, programs};
use crate::runtime::text;
use crate::support::container::{Containers, unique};
use crate::support::session::{Answer, DONE, finish};
use crate::support::{skip, wait};

/// Makes the data directory if there is none, and becomes the server.
const SCRIPT: &str = r#"
user="setpriv --reuid=postgres --regid=postgres --clear-groups"
cd /pg
chown postgres:postgres .
[ -e data/PG_VERSION ] || $user BIN/initdb --auth=trust -D data >log 2>&1
rm -f data/postmaster.pid
exec $user BIN/postgres -D data -c listen_addresses= -c max_connections=40 -k /pg >>log 2>&1
"#;

/// Where the data is.
#[derive(Clone, Copy, PartialEq)]
enum Place {
    Layer,
    Volume,
}

struct Server {
    containers: Containers,
    programs: PathBuf,
    bundle: PathBuf,
    id: String,
    place: Place,
    pid: i32,
}

impl Server {
    fn start(programs: PathBuf, place: Place, name: &str) -> Self {
        let containers = Containers::new();
        let scratch = containers.session.scratch();
        for name in ["layer", "volume"] {
            std::fs::create_dir(scratch.join(name)).expect("making a directory");
        }
        let script = SCRIPT.replace("BIN", text(&programs));
        let volume = format!("{}:/pg", text(&scratch.join("volume")));
        let mut options = vec!["host", "--mount", "/etc/passwd:/etc/passwd:ro"];
        if place == Place::Volume {
            options.extend(["--mount", &volume]);
        }
        let script = format!("mkdir -p /pg; {script}");
        options.extend(["--", "sh", "-ec", &script]);
        let bundle = containers.bundle("bundle", &options);
        let mut server = Self {
            containers,
            programs,
            bundle,
            id: unique(name),
            place,
            pid: 0,
        };
        server.run();
        server
    }

    /// Starts the container with the layer and the volume there are.
    fn run(&mut self) {
        let layer = self.containers.session.scratch().join("layer");
        let overlay = format!("--overlay={}", text(&layer));
        self.pid = self
            .containers
            .start_with(&[&overlay], &self.id, &self.bundle);
        wait::until("PostgreSQL answers", || {
            Client::connect(&self.directory())
                .ask("select 1")
                .as_deref()
                == Some("1")
        });
    }

    /// Kills the container and starts it again: the server finds its files as after a crash.
    fn restart(&mut self) {
        let deleted = self
            .containers
            .session
            .run(&["delete", "--force", &self.id]);
        deleted.expect(DONE, "delete");
        self.run();
    }

    /// Writes a checkpoint to disk, ends the container and wipes its files, and makes it again of the image.
    fn move_by_image(&mut self, name: &str) {
        let session = &self.containers.session;
        let scratch = session.scratch();
        let image = scratch.join(format!("image-{name}"));
        let run = |arguments: &[&str]| session.run(arguments).expect(DONE, arguments[0]);
        run(&[
            "persist",
            "--name",
            name,
            "--image-path",
            text(&image),
            &self.id,
        ]);
        run(&["delete", "--force", &self.id]);
        self.containers.wipe();
        for name in ["layer", "volume"] {
            let directory = scratch.join(name);
            std::fs::remove_dir_all(&directory).expect("removing what the container wrote");
            std::fs::create_dir(&directory).expect("making a directory");
        }
        let overlay = format!("--overlay={}", text(&scratch.join("layer")));
        let log = scratch.join("restore.log");
        let (image, bundle) = (text(&image), text(&self.bundle));
        let arguments = [
            "restore",
            "--verify",
            "--detach",
            "--image-path",
            image,
            "--bundle",
            bundle,
            &overlay,
            &self.id,
        ];
        self.containers
            .run_logged(&log, &arguments)
            .expect(DONE, "restore");
        self.pid = self.containers.pid(&self.id);
    }

    fn directory(&self) -> PathBuf {
        PathBuf::from(format!("/proc/{}/root/pg", self.pid))
    }

    fn checkpoint(&self, name: &str) {
        let mut arguments = vec!["checkpoint", "--json", "--name", name];
        if self.place == Place::Volume {
            arguments.extend(["--volume", "/pg"]);
        }
        arguments.push(&self.id);
        let taken = self.containers.session.run(&arguments);
        taken.expect(DONE, "checkpoint");
    }

    fn rollback(&self, name: &str) -> Answer {
        let arguments = ["rollback", "--verify", "--json", "--to", name, &self.id];
        self.containers
            .session
            .run(&arguments)
            .expect(DONE, "rollback")
    }

    /// A program of PostgreSQL's, as a client.
    fn tool(&self, name: &str, arguments: &[&str]) -> Command {
        let mut command = Command::new(self.programs.join(name));
        command
            .args(["-U", "postgres", "-h"])
            .arg(self.directory())
            .args(arguments);
        command
    }

    fn use_tool(&self, name: &str, arguments: &[&str]) {
        finish(self.tool(name, arguments)).expect(DONE, name);
    }

    /// pgbench in the background, which may fail: connections that were busy are reset.
    fn load(&self) -> Load {
        let mut command = self.tool("pgbench", &["-n", "-c", "8", "-T", "600", "postgres"]);
        let child = command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("starting pgbench");
        Load(child)
    }

    fn ask(&self, statement: &str) -> String {
        let answer = Client::connect(&self.directory()).ask(statement);
        answer.unwrap_or_else(|| panic!("no answer to {statement}: {}", self.log()))
    }

    fn log(&self) -> String {
        let log = std::fs::read_to_string(self.directory().join("log"));
        log.unwrap_or_default()
    }

    /// Waits until pgbench has done something.
    fn goes_on(&self) {
        let before = self.transactions();
        wait::until("pgbench goes on", || self.transactions() > before + 100);
    }

    /// Waits until the sessions of pgbench have ended.
    fn is_quiet(&self) {
        let left = "select count(*) from pg_stat_activity where application_name = 'pgbench'";
        wait::until("the sessions of pgbench have ended", || {
            self.ask(left) == "0"
        });
    }

    fn transactions(&self) -> u64 {
        let count = self.ask("select count(*) from pgbench_history");
        count.parse().expect("a number")
    }

    /// What pgbench never changes the sum of, whatever it has done: all four are the same.
    fn balances(&self) -> String {
        let sums = self.ask(
            "select concat_ws(' ', (select sum(abalance) from pgbench_accounts), (select sum(bbalance) from \
             pgbench_branches), (select sum(tbalance) from pgbench_tellers), (select coalesce(sum(delta), 0) from \
             pgbench_history))",
        );
        let words: Vec<&str> = sums.split(' ').collect();
        assert!(
            words.len() == 4 && words.iter().all(|sum| *sum == words[0]),
            "sums differ: {sums}"
        );
        sums
    }

    /// A digest of all rows, by PostgreSQL.
    fn digest(&self) -> String {
        self.ask(
            "select md5(string_agg(row, ',' order by row)) from (select t::text as row from pgbench_history t union all \
             select t::text from pgbench_accounts t where abalance <> 0 union all select t::text from \
             pgbench_tellers t) rows",
        )
    }

    /// Everything that can be wrecked in files, past what was there.
    fn wreck(&self) {
        self.ask("drop table pgbench_branches; select 1");
        self.use_tool("psql", &["-qc", "vacuum full pgbench_accounts", "postgres"]);
        self.use_tool("psql", &["-qc", "create database another", "postgres"]);
        self.use_tool(
            "psql",
            &[
                "-qc",
                "create table large as select g, md5(g::text) from generate_series(1, 20000) g",
                "another",
            ],
        );
        self.use_tool("psql", &["-qc", "checkpoint", "postgres"]);
    }

    /// Waits for the eight sessions of pgbench to end; what each had in hand may still be done.
    fn ends_what_was_in_hand(&self, before: u64, after: u64, round: u32) {
        self.is_quiet();
        self.check();
        self.balances();
        let done = self.transactions();
        assert!(
            (before..=after + 8).contains(&done),
            "round {round}: {before} {done} {after}"
        );
    }

    /// pg_amcheck reads every page of every table and index.
    fn check(&self) {
        self.use_tool("pg_amcheck", &["--all", "--heapallindexed"]);
        assert_eq!(
            self.ask("select count(*) from pg_database where datname = 'another'"),
            "0"
        );
    }
}

struct Load(Child);

impl Drop for Load {
    fn drop(&mut self) {
        // It may have ended with its connections.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn comes_back_with_its_files(place: Place, name: &str) {
    let Some(programs) = programs() else {
        skip!("no PostgreSQL");
    };
    let mut server = Server::start(programs, place, name);
    let scale = std::env::var("SNAPBACK_SCALE").unwrap_or_else(|_| "1".to_owned());
    server.use_tool("pgbench", &["-i", "-q", "-s", &scale, "postgres"]);
    // The extension it needs is made once, so that it changes nothing later.
    server.use_tool("pg_amcheck", &["--all", "--install-missing"]);
    for round in 0..rounds() {
        let mut idle = Client::connect(&server.directory());
        let own = idle.ask("create temp table own as select 42 as v; select v from own");
        assert_eq!(own.as_deref(), Some("42"));
        let load = server.load();
        server.goes_on();
        let before = server.transactions();
        server.checkpoint("busy");
        let after = server.transactions();
        server.goes_on();
        drop(load);
        server.is_quiet();
        server.checkpoint("quiet");
        let quiet = (server.digest(), server.balances());

        let load = server.load();
        server.goes_on();
        drop(load);
        server.wreck();
        server.rollback("quiet");
        server.check();
        assert_eq!((server.digest(), server.balances()), quiet, "round {round}");
        assert_eq!(
            idle.ask("select v from own").as_deref(),
            Some("42"),
            "round {round}"
        );

        server.wreck();
        server.rollback("busy");
        // Eight sessions were at work: what each had in hand may still be done, and then they end.
        server.ends_what_was_in_hand(before, after, round);
        assert_eq!(
            idle.ask("select v from own").as_deref(),
            Some("42"),
            "round {round}"
        );

        // The files alone, as they are the moment after a rollback.
        server.rollback("quiet");
        server.restart();
        server.check();
        assert_eq!(
            (server.digest(), server.balances()),
            quiet,
            "round {round}, started again"
        );
    }
    let log = server.log();
    assert!(
        !log.contains("PANIC") && !log.contains("invalid page"),
        "{log}"
    );
}

/// Processes and files together, to disk and back, of a moment of rest and of one of work.
fn moves_by_image(place: Place, name: &str) {
    let Some(programs) = programs() else {
        skip!("no PostgreSQL");
    };
    let mut server = Server::start(programs, place, name);
    server.use_tool("pgbench", &["-i", "-q", "-s", "1", "postgres"]);
    server.use_tool("pg_amcheck", &["--all", "--install-missing"]);
    for round in 0..rounds().min(10) {
        let load = server.load();
        server.goes_on();
        let before = server.transactions();
        server.checkpoint("busy");
        let after = server.transactions();
        server.goes_on();
        drop(load);
        server.is_quiet();
        server.move_by_image("busy");
        // Its clients are not there any more, but what they had asked for may still be done.
        server.ends_what_was_in_hand(before, after, round);

        server.checkpoint("quiet");
        let quiet = (server.digest(), server.balances());
        server.wreck();
        server.move_by_image("quiet");
        server.check();
        assert_eq!((server.digest(), server.balances()), quiet, "round {round}");
        let load = server.load();
        server.goes_on();
        drop(load);
        server.is_quiet();
        server.wreck();
        server.rollback("quiet");
        server.check();
        assert_eq!(
            (server.digest(), server.balances()),
            quiet,
            "round {round}, rolled back"
        );
        server.restart();
        server.check();
    }
}

#[test]
fn by_an_image_in_the_writable_layer() {
    moves_by_image(Place::Layer, "pg-image-layer");
}

#[test]
fn by_an_image_in_a_volume() {
    moves_by_image(Place::Volume, "pg-image-volume");
}

#[test]
fn in_the_writable_layer() {
    comes_back_with_its_files(Place::Layer, "pg-layer");
}

#[test]
fn in_a_volume() {
    comes_back_with_its_files(Place::Volume, "pg-volume");
}

/// Killed and made again of what is in RAM, at a moment of rest and at one of work.
fn is_made_again(place: Place, name: &str) {
    let Some(programs) = programs() else {
        skip!("no PostgreSQL");
    };
    let mut server = Server::start(programs, place, name);
    server.use_tool("pgbench", &["-i", "-q", "-s", "1", "postgres"]);
    server.use_tool("pg_amcheck", &["--all", "--install-missing"]);
    let load = server.load();
    server.goes_on();
    let before = server.transactions();
    server.checkpoint("busy");
    let after = server.transactions();
    server.goes_on();
    drop(load);
    server.is_quiet();
    server.checkpoint("quiet");
    let quiet = (server.digest(), server.balances());
    for (round, to) in (0..).zip(["quiet", "busy"]) {
        let load = server.load();
        server.goes_on();
        drop(load);
        server.wreck();
        let killed = server.containers.session.run(&["kill", &server.id, "KILL"]);
        killed.expect(DONE, "kill");
        wait::until("the container has stopped", || {
            server.containers.status(&server.id) == "stopped"
        });
        server.rollback(to);
        server.pid = server.containers.pid(&server.id);
        if to == "busy" {
            server.ends_what_was_in_hand(before, after, round);
            continue;
        }
        for _ in 0..2 {
            server.check();
            assert_eq!((server.digest(), server.balances()), quiet);
            server.wreck();
            server.rollback(to);
        }
    }
    server.restart();
    server.check();
}

#[test]
fn made_again_with_its_writable_layer() {
    is_made_again(Place::Layer, "pg-again-layer");
}

#[test]
fn made_again_with_its_volume() {
    is_made_again(Place::Volume, "pg-again-volume");
}
