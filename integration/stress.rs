//! Random system calls in trees of up to six processes, random checkpoints, and rollbacks to any of them. What the
//! program believes goes back with its memory; what the kernel holds has to agree with that afterwards.
//!
//! Every seed is a test run of its own and always does the same. `SNAPBACK_SEEDS=17` repeats one,
//! `SNAPBACK_SEEDS=100..400` runs many.

use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::Command;

use crate::support::fixture::{Fixture, build_directory};
use crate::support::numbers;
use crate::support::session::{Answer, DONE, LOST, REFUSED, Session};

/// Seeds of a normal test run.
const SEEDS: Range<u64> = 0..40;
/// Checkpoints and rollbacks of one seed.
const ROUNDS: usize = 6;
const NAMES: [&str; 2] = ["one", "two"];

/// SplitMix64: small, and the same for ever.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut x = self.0;
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }
}

/// What a checkpoint has to bring back.
struct Taken {
    name: &'static str,
    /// What `v` said right before. What operations end in that were under way at a checkpoint may differ every time: sockets
    /// get other ports, files have grown.
    verified: Option<String>,
}

/// How often what came of it, over all seeds.
#[derive(Debug, Default)]
struct Count {
    checkpoints: usize,
    refused_checkpoints: usize,
    rollbacks: usize,
    refused_rollbacks: usize,
    revived: u64,
}

struct Run {
    random: Random,
    session: Session,
    fixture: Fixture,
    taken: Vec<Taken>,
    count: Count,
}

fn describe(answer: &Answer) -> String {
    format!("{} {}", answer.out.trim(), answer.err.trim())
}

impl Run {
    fn new(seed: u64) -> Self {
        Self {
            random: Random(seed),
            session: Session::new(),
            fixture: Fixture::launch("stress", Command::new(build_directory().join("stress"))),
            taken: Vec::new(),
            count: Count::default(),
        }
    }

    fn operations(&mut self, most: u64) -> String {
        let count = 1 + self.random.below(most);
        format!("o{:016x}{count:04x}", self.random.next())
    }

    fn operate(&mut self) {
        // Few or many, so that some rollbacks have little and others everything to do.
        let most = [5, 40, 200][self.random.below(3) as usize];
        let operations = self.operations(most);
        let answer = self.fixture.ask_all(operations.as_bytes());
        assert_eq!(answer, "OK", "operations {operations}");
    }

    /// What `v` says, which must begin with `PASS`.
    fn verified(&mut self, when: &str) -> String {
        let mut answer = self.fixture.ask(b'v');
        if answer == "OK" {
            // Of operations that were under way at the checkpoint.
            answer = self.fixture.answer("v");
        }
        assert!(answer.starts_with("PASS "), "{when}: {answer}");
        answer
    }

    fn assert_refused(answer: &Answer) {
        assert_eq!(answer.text("outcome"), "refused", "{answer:#?}");
        for part in ["object", "holder", "remedy"] {
            let text = answer.report["refused"][part].as_str().unwrap_or_default();
            assert!(!text.is_empty(), "a refusal without {part}: {answer:#?}");
        }
    }

    /// From now on those that are there may end, or else only those may that are born later.
    fn keep(&mut self) {
        let command = match self.random.below(2) {
            0 => b'k',
            _ => b'f',
        };
        assert_eq!(self.fixture.ask(command), "OK");
    }

    fn checkpoint(&mut self) {
        let name = NAMES[self.random.below(2) as usize];
        self.operate();
        // Nobody may end until the checkpoint is there.
        assert_eq!(self.fixture.ask(b'n'), "OK");
        // Connections that wait to be accepted make most rollbacks impossible.
        if self.random.below(8) > 0 {
            assert_eq!(self.fixture.ask(b'a'), "OK");
        }
        self.verified("before the checkpoint");
        let before = self.verified("again before the checkpoint");
        let under_way = self.random.below(4) == 0;
        if under_way {
            let operations = self.operations(1000);
            self.fixture.send(operations.as_bytes());
        }
        let pid = self.fixture.pid().to_string();
        self.session.will_release(self.fixture.pid());
        let answer = self
            .session
            .run(&["checkpoint", "--name", name, "--json", "--pid", &pid]);
        if under_way {
            let answer = self.fixture.answer("operations");
            assert_eq!(answer, "OK", "operations during a checkpoint");
        }
        match answer.status {
            DONE => {
                self.count.checkpoints += 1;
                self.taken.retain(|taken| taken.name != name);
                self.taken.push(Taken {
                    name,
                    verified: (!under_way).then(|| before.clone()),
                });
            }
            REFUSED => {
                Self::assert_refused(&answer);
                self.count.refused_checkpoints += 1;
                println!("  checkpoint refused: {}", answer.report["refused"]);
            }
            _ => panic!("checkpoint: {}", describe(&answer)),
        }
        let after = self.verified("after a checkpoint");
        assert!(
            under_way || after == before,
            "a checkpoint changed something: {before}, {after}"
        );
        self.keep();
    }

    fn rollback(&mut self) {
        if self.taken.is_empty() {
            return;
        }
        let at = self.random.below(self.taken.len() as u64) as usize;
        let before = self.verified("before the rollback");
        let pid = self.fixture.pid().to_string();
        let name = self.taken[at].name;
        let answer = self.session.run(&[
            "rollback", "--to", name, "--verify", "--json", "--pid", &pid,
        ]);
        match answer.status {
            DONE => {
                self.count.rollbacks += 1;
                self.count.revived += answer.number("revived");
                let after = self.verified("after the rollback");
                if let Some(expected) = &self.taken[at].verified {
                    assert_eq!(&after, expected, "the digest after the rollback");
                }
                self.keep();
            }
            REFUSED => {
                Self::assert_refused(&answer);
                self.count.refused_rollbacks += 1;
                println!("  rollback refused: {}", answer.report["refused"]);
                let after = self.verified("after a refused rollback");
                assert_eq!(after, before, "a refused rollback changed something");
            }
            LOST => {
                let alive = numbers::is_alive(self.fixture.pid());
                panic!("lost (alive: {alive}): {}", describe(&answer));
            }
            _ => panic!("rollback: {}", describe(&answer)),
        }
    }

    fn go(&mut self) {
        self.operate();
        self.checkpoint();
        for _ in 0..ROUNDS {
            match self.random.below(8) {
                0 => self.checkpoint(),
                // A process of the checkpoint ends.
                1 if self.random.below(8) == 0 => drop(self.fixture.ask(b'e')),
                _ => self.operate(),
            }
            self.rollback();
        }
        self.operate();
        self.verified("at the end");
    }
}

fn seeds() -> Range<u64> {
    let Ok(text) = std::env::var("SNAPBACK_SEEDS") else {
        return SEEDS;
    };
    let number = |text: &str| text.parse().expect("SNAPBACK_SEEDS is FROM..TO or a seed");
    match text.split_once("..") {
        Some((from, to)) => number(from)..number(to),
        None => number(&text)..number(&text) + 1,
    }
}

#[test]
fn random_operations_come_back() {
    let mut failed = Vec::new();
    let mut total = Count::default();
    for seed in seeds() {
        println!("seed {seed}");
        let run = catch_unwind(AssertUnwindSafe(|| {
            let mut run = Run::new(seed);
            run.go();
            run.count
        }));
        match run {
            Ok(count) => {
                total.checkpoints += count.checkpoints;
                total.refused_checkpoints += count.refused_checkpoints;
                total.rollbacks += count.rollbacks;
                total.refused_rollbacks += count.refused_rollbacks;
                total.revived += count.revived;
            }
            Err(_) => failed.push(seed),
        }
    }
    println!("{total:?}");
    assert!(
        failed.is_empty(),
        "failed, repeat with SNAPBACK_SEEDS=SEED: {failed:?}"
    );
    assert!(total.rollbacks > 0 || total.checkpoints == 0, "{total:?}");
}
