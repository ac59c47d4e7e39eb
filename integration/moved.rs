//! Redis, written to disk; its container, its keeper, its files and the state directory are gone; then it is made again.
//! `SNAPBACK_ROUNDS` (2) times, `SNAPBACK_MB` (8) of data.

use std::path::PathBuf;

use crate::support::container::{Containers, unique};
use crate::support::redis::{self, Client};
use crate::support::session::DONE;
use crate::support::skip;

fn number(variable: &str, default: u32) -> u32 {
    let set = std::env::var(variable).ok();
    set.map_or(default, |text| text.parse().expect("a number"))
}

#[test]
fn redis_is_made_again_and_again() {
    if std::process::Command::new("redis-server")
        .arg("-v")
        .output()
        .is_err()
    {
        skip!("no redis-server");
    }
    let containers = Containers::new();
    let session = &containers.session;
    let run = |arguments: &[&str]| session.run(arguments).expect(DONE, arguments[0]);
    let bundle = containers.bundle("bundle", &["redis", "--port", "0"]);
    let layer = session.scratch().join("layer");
    std::fs::create_dir(&layer).expect("making a directory");
    let (overlay, image) = (
        format!("--overlay={}", layer.display()),
        session.scratch().join("image"),
    );
    let image = image.to_str().expect("a path in UTF-8");
    let id = unique("moved-redis");
    let socket = |pid: i32| PathBuf::from(format!("/proc/{pid}/root/run/redis.sock"));
    let pid = containers.start_with(&[&overlay], &id, &bundle);
    let mut client = Client::wait_for(&socket(pid));
    redis::fill(&mut client);
    let keys = number("SNAPBACK_MB", 8) * 1000;
    client.must("CONFIG SET maxmemory 0");
    client.must(&format!("DEBUG POPULATE {keys} more 900"));
    for round in 0..number("SNAPBACK_ROUNDS", 2) {
        client.must(&format!("SET round {round}"));
        let digest = client.must("DEBUG DIGEST");
        run(&["checkpoint", &id]);
        client.must("FLUSHALL");
        run(&["persist", "--image-path", image, &id]);
        drop(client);
        run(&["delete", "--force", &id]);
        containers.wipe();
        std::fs::remove_dir_all(&layer).expect("removing the layer");
        std::fs::create_dir(&layer).expect("making a directory");

        let log = session.scratch().join("restore.log");
        let bundle = bundle.to_str().expect("a path in UTF-8");
        let restore = ["restore", "--verify", "--detach", "--image-path", image];
        let arguments = [&restore[..], &["--bundle", bundle, &overlay, &id]].concat();
        containers
            .run_logged(&log, &arguments)
            .expect(DONE, "restore");
        client = Client::wait_for(&socket(containers.pid(&id)));
        assert_eq!(client.must("DEBUG DIGEST"), digest, "round {round}");
        client.must("FLUSHALL");
        drop(client);
        run(&["rollback", "--verify", &id]);
        client = Client::wait_for(&socket(containers.pid(&id)));
        assert_eq!(
            client.must("DEBUG DIGEST"),
            digest,
            "rolled back, round {round}"
        );
        assert_eq!(client.must("GET round"), round.to_string());
        run(&["release", "--all", &id]);
        std::fs::remove_dir_all(image).expect("removing the image");
    }
}
