//! Trees of checkpoints: any number of them, rolled back in any order, each state the one that was.

use std::collections::BTreeMap;

use snapback::fault;

use crate::support::fixture::Fixture;
use crate::support::numbers;
use crate::support::session::{DONE, Session};
use crate::support::wait;

/// Checkpoints in the long chain; `SNAPBACK_ROUNDS` overrides it.
fn rounds() -> usize {
    let text = std::env::var("SNAPBACK_ROUNDS").ok();
    text.and_then(|text| text.parse().ok()).unwrap_or(1000)
}

/// Numbers without an order, the same every time.
struct Dice(u64);

impl Dice {
    fn below(&mut self, most: usize) -> usize {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % most
    }
}

/// A search, its checkpoints by name, and what it said of its state at each.
struct Search {
    session: Session,
    fixture: Fixture,
    states: BTreeMap<String, String>,
}

impl Search {
    fn new() -> Self {
        let mut session = Session::new();
        let fixture = Fixture::start("search_tree");
        session.will_release(fixture.pid());
        Self {
            session,
            fixture,
            states: BTreeMap::new(),
        }
    }

    fn command(&self, arguments: &[&str]) -> crate::support::session::Answer {
        let pid = self.fixture.pid().to_string();
        let all = [arguments, &["--pid", &pid]].concat();
        self.session.run(&all).expect(DONE, &arguments.join(" "))
    }

    /// A step, and a checkpoint after it.
    fn step(&mut self, name: &str) {
        self.fixture.run_on();
        self.take(name);
    }

    fn take(&mut self, name: &str) {
        let state = self.fixture.ask(b's');
        assert_ne!(
            self.states.values().find(|other| **other == state),
            Some(&state)
        );
        self.states.insert(name.to_owned(), state);
        self.command(&["checkpoint", "--name", name]);
    }

    /// Back to a checkpoint, from whatever there is now.
    #[track_caller]
    fn back(&mut self, name: &str, verify: bool) {
        match verify {
            true => self.command(&["rollback", "--verify", "--to", name]),
            false => self.command(&["rollback", "--to", name]),
        };
        assert_eq!(self.fixture.ask(b's'), self.states[name], "{name}");
        self.fixture.verify(name);
    }

    /// From each checkpoint where it came from, as the command tells.
    fn parents(&self) -> BTreeMap<String, Option<String>> {
        let listed = self.command(&["checkpoints", "--json"]).report;
        let all = listed["checkpoints"].as_array().expect("a list").iter();
        let text = |value: &serde_json::Value| value.as_str().map(str::to_owned);
        all.map(|info| (text(&info["name"]).expect("a name"), text(&info["parent"])))
            .collect()
    }

    fn shadows(&self) -> usize {
        self.fixture.family.members().len() - 2
    }
}

/// A long chain, rolled back in random order, then thinned from the middle.
#[test]
fn a_thousand_in_a_chain() {
    let mut search = Search::new();
    let count = rounds();
    for turn in 0..count {
        search.step(&turn.to_string());
    }
    // One of each process, and another whenever so much was copied that the first has little in common with the last.
    let shadows = search.shadows();
    assert!(shadows <= 2 + count / 50, "{shadows}");
    let parents = search.parents();
    assert_eq!(parents.len(), count);
    assert_eq!(parents["0"], None);
    assert!((1..count).all(|turn| parents[&turn.to_string()] == Some((turn - 1).to_string())));
    let mut dice = Dice(1);
    for turn in 0..200 {
        let to = dice.below(count).to_string();
        if turn % 3 == 0 {
            search.fixture.mutate();
        }
        search.back(&to, turn % 4 == 0);
    }
    for turn in (0..count).filter(|turn| turn % 10 != 3) {
        let name = turn.to_string();
        search.command(&["release", "--name", &name]);
        search.states.remove(&name);
    }
    let left: Vec<String> = search.states.keys().cloned().collect();
    let parents = search.parents();
    assert!(
        (1..count / 10)
            .all(|ten| parents[&(ten * 10 + 3).to_string()] == Some((ten * 10 - 7).to_string()))
    );
    for name in left {
        search.back(&name, true);
    }
    assert!(search.shadows() <= shadows);
}

/// Twenty deep, three ways at each node: paths by chance, some of them gone down again.
#[test]
fn a_search_tree() {
    const DEPTH: usize = 20;
    const WAYS: usize = 3;
    let mut search = Search::new();
    search.take("n");
    let mut dice = Dice(2);
    for _ in 0..25 {
        let mut node = "n".to_owned();
        for _ in 0..DEPTH {
            let child = format!("{node}{}", dice.below(WAYS));
            if !search.states.contains_key(&child) {
                search.back(&node, false);
                search.step(&child);
            }
            node = child;
        }
    }
    let parents = search.parents();
    assert_eq!(parents.len(), search.states.len());
    for (name, parent) in &parents {
        let above = name[..name.len() - 1].to_owned();
        assert_eq!(
            *parent,
            Some(above).filter(|name| !name.is_empty()),
            "{name}"
        );
    }
    let names: Vec<String> = search.states.keys().cloned().collect();
    assert!(names.iter().any(|name| name.len() == DEPTH + 1));
    for turn in 0..150 {
        search.back(&names[dice.below(names.len())], turn % 3 == 0);
        if turn % 5 == 0 {
            search.fixture.mutate();
        }
    }
    assert!(search.shadows() <= 12, "{}", search.shadows());
}

/// Processes that have ended come back as increments have them, and others are increments of them again.
#[test]
fn the_dead_come_back_from_increments() {
    let mut search = Search::new();
    for turn in 0..6 {
        search.step(&turn.to_string());
    }
    for (to, next) in [("4", "a"), ("2", "b"), ("a", "c"), ("5", "d"), ("0", "e")] {
        let root = search.fixture.pid();
        let members = search.fixture.family.members();
        let child = members
            .into_iter()
            .find(|pid| *pid != root && numbers::status_number(*pid, "TracerPid") == Some(0));
        let child = child.expect("its child");
        nix::sys::signal::kill(
            nix::unistd::Pid::from_raw(child),
            nix::sys::signal::Signal::SIGKILL,
        )
        .expect("killing the child");
        search.back(to, true);
        search.step(next);
    }
    for name in ["1", "a", "b", "e", "c", "3", "d"] {
        search.back(name, true);
    }
}

/// Thinning as a series goes on; what is pinned stays.
#[test]
fn a_series_that_is_thinned() {
    let mut search = Search::new();
    let first = search.fixture.ask(b's');
    search.command(&["checkpoint", "--pin", "--name", "first"]);
    for turn in 0..30 {
        search.fixture.run_on();
        search.command(&["checkpoint", "--keep", "5", "--name", &turn.to_string()]);
    }
    let names: Vec<String> = search.parents().into_keys().collect();
    assert_eq!(names, ["25", "26", "27", "28", "29", "first"]);
    assert_eq!(search.parents()["25"], Some("first".to_owned()));
    search.states.insert("first".to_owned(), first);
    search.back("first", true);
    let table = search.command(&["checkpoints"]).out;
    let line = table.lines().find(|line| line.starts_with("first"));
    assert!(
        line.is_some_and(|line| line.contains("current,pinned")),
        "{table}"
    );
}

/// The keeper is killed at every point that only a later checkpoint passes.
#[test]
fn a_killed_keeper_leaves_the_tree_untouched() {
    let points = fault::POINTS.iter();
    for point in points.filter(|point| point.starts_with("increment.")) {
        println!("{point}");
        let mut search = Search::new();
        search.session.set(fault::VARIABLE, point);
        search.command(&["checkpoint", "--name", "first"]);
        search.fixture.run_on();
        let state = search.fixture.ask(b's');
        let answer = search.session.try_checkpoint(search.fixture.pid());
        assert_ne!(answer.status, DONE, "{point} was not reached: {answer:#?}");
        wait::until("the keeper is gone", || search.session.keepers().is_empty());
        wait::until("no shadow is left", || search.shadows() == 0);
        assert_eq!(search.fixture.ask(b's'), state, "{point}");
        search.fixture.verify(point);
        search.session.unset(fault::VARIABLE);
        search.step("again");
        search.step("and again");
        search.back("again", true);
    }
}

/// What a keeper and the program hold does not grow with checkpoints, rollbacks and releases.
#[test]
fn stays_flat() {
    let mut search = Search::new();
    let mut dice = Dice(3);
    let turn = |search: &mut Search, dice: &mut Dice, number: usize| {
        search.step(&number.to_string());
        if search.states.len() > 12 {
            let names: Vec<String> = search.states.keys().cloned().collect();
            let gone = &names[dice.below(names.len())];
            search.command(&["release", "--name", gone]);
            search.states.remove(gone);
        }
        if number.is_multiple_of(3) {
            let names: Vec<String> = search.states.keys().cloned().collect();
            search.back(&names[dice.below(names.len())], false);
        }
    };
    let look = |search: &Search| {
        let keeper = search.session.keepers()[0];
        let [keeper, program] =
            [keeper, search.fixture.pid()].map(|pid| numbers::holdings(pid).expect("it lives"));
        (keeper, program, search.shadows())
    };
    let count = rounds();
    for number in 0..count / 4 {
        turn(&mut search, &mut dice, number);
    }
    let before = look(&search);
    for number in count / 4..count {
        turn(&mut search, &mut dice, number);
    }
    let after = look(&search);
    assert_eq!(before.2, after.2, "shadows");
    for (first, last) in [(before.0, after.0), (before.1, after.1)] {
        assert!(
            last.descriptors <= first.descriptors + 8,
            "{first:?} {last:?}"
        );
        assert_eq!(first.threads, last.threads);
        assert!(last.mappings <= first.mappings + 24, "{first:?} {last:?}");
        let most = first.resident_kib + first.resident_kib / 4 + 2048;
        assert!(last.resident_kib <= most, "{first:?} {last:?}");
    }
}
