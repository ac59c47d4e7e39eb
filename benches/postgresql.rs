//! PostgreSQL, its files included, brought back after 1,000 transactions of pgbench: by a rollback, and by what is done
//! otherwise.

mod support;

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use support::container::{Container, must, wait_for};
use support::{judged, middle, ms, table};

const ROUNDS: usize = 5;
const SCRIPT: &str = r#"
user="setpriv --reuid=postgres --regid=postgres --clear-groups"
mkdir -p /pg; cd /pg; chown postgres:postgres .
[ -e data/PG_VERSION ] || $user BIN/initdb --auth=trust -D data >log 2>&1
rm -f data/postmaster.pid
exec $user BIN/postgres -D data -c listen_addresses= -k /pg >>log 2>&1
"#;

fn main() {
    let Some(programs) = programs() else {
        println!("SKIP benches/postgresql: no PostgreSQL");
        assert!(std::env::var_os("SNAPBACK_STRICT").is_none_or(|value| value != "1"));
        return;
    };
    let script = SCRIPT.replace("BIN", programs.to_str().expect("a path in UTF-8"));
    let container = Container::start(&["host", "--", "sh", "-ec", &script]);
    let mut server = Server {
        container,
        programs,
    };
    server.wait();
    server.pgbench(&["-i", "-q", "-s", "10", "postgres"]);

    server.container.ask(&["checkpoint"]);
    let back = server.measured("postgres", |server| {
        server.container.ask(&["rollback"]);
    });
    server.container.ask(&["release"]);

    server.sql("create database work template postgres");
    let template = server.measured("work", |server| {
        server.sql("drop database work");
        server.sql("create database work template postgres");
    });
    server.sql("drop database work");

    let data = server.container.place.join("layer/upper/pg/data");
    let copy = server.container.place.join("copy");
    server.container.ask(&["delete", "--force"]);
    must(Command::new("cp").arg("-a").args([&data, &copy]));
    server.container.run();
    server.wait();
    let rsync = server.measured("postgres", |server| {
        server.container.ask(&["delete", "--force"]);
        let slash = |path: &Path| format!("{}/", path.display());
        must(Command::new("rsync").args(["-a", "--delete", &slash(&copy), &slash(&data)]));
        server.container.run();
        server.wait();
    });
    let row = |name: &str, time: f64| {
        let ratio = format!("{:.1}", time / back);
        vec![name.to_owned(), ms(time), ratio]
    };
    table(
        "PostgreSQL (pgbench, scale 10) after 1,000 transactions (median of 5, process starts included)",
        &["brought back by", "ms", "times the rollback"],
        &[
            row("snapback rollback", back),
            row("DROP DATABASE, CREATE DATABASE TEMPLATE", template),
            row("container started again, files by rsync", rsync),
        ],
    );
    println!("rollback / TEMPLATE: {}", judged(back / template, 0.1));
    println!("rollback / rsync: {}", judged(back / rsync, 0.1));
}

struct Server {
    container: Container,
    programs: PathBuf,
}

impl Server {
    fn tool(&self, name: &str, arguments: &[&str]) -> Command {
        let mut command = Command::new(self.programs.join(name));
        command
            .args(["-U", "postgres", "-h"])
            .arg(self.container.path("/pg"))
            .args(arguments)
            .stdin(Stdio::null());
        command
    }

    fn pgbench(&self, arguments: &[&str]) {
        must(&mut self.tool("pgbench", arguments));
    }

    fn sql(&self, statement: &str) {
        must(&mut self.tool("psql", &["-qc", statement, "template1"]));
    }

    fn wait(&self) {
        wait_for("PostgreSQL", || {
            let asked = self
                .tool("psql", &["-qc", "select 1", "template1"])
                .output();
            asked.expect("starting psql").status.success()
        });
    }

    /// The median time, in microseconds, of bringing it back after 1,000 transactions.
    fn measured(&mut self, database: &str, mut back: impl FnMut(&mut Server)) -> f64 {
        let rounds = (0..ROUNDS).map(|_| {
            self.pgbench(&["-n", "-c", "4", "-t", "250", database]);
            let began = Instant::now();
            back(self);
            began.elapsed().as_secs_f64() * 1e6
        });
        middle(rounds.collect())
    }
}

/// Where the newest version has its programs.
fn programs() -> Option<PathBuf> {
    let versions = std::fs::read_dir("/usr/lib/postgresql").ok()?.flatten();
    let directories = versions.map(|entry| entry.path().join("bin"));
    directories
        .filter(|path| path.join("postgres").exists())
        .max()
}
