use proptest::prelude::*;

use super::*;
use crate::objects::socket_options::{Options, Sort};
use crate::objects::tcp::Connection;

fn id(index: usize) -> ObjectId {
    ObjectId::from_raw(index as u64 + 1).expect("not zero")
}

fn state(index: usize, family: i32, kind: i32, protocol: i32, role: Role) -> State {
    State {
        cookie: 1000 + index as u64,
        namespace: 1,
        inode: 100 + index as u64,
        sort: Sort {
            family,
            kind,
            protocol,
        },
        local: Address::default(),
        peer: Address::default(),
        extra: Default::default(),
        options: Options::default(),
        file: None,
        role,
        queue: Vec::new(),
        irreplaceable: None,
        inner: false,
        credentials: None,
    }
}

fn loopback(port: u16) -> Address {
    let mut bytes = vec![0u8; 16];
    bytes[..2].copy_from_slice(&(libc::AF_INET as u16).to_ne_bytes());
    bytes[2..4].copy_from_slice(&port.to_be_bytes());
    bytes[4..8].copy_from_slice(&[127, 0, 0, 1]);
    Address(bytes)
}

/// Two ends, at `index` and the next.
fn unix_pair(index: usize) -> [State; 2] {
    [(index, index + 1), (index + 1, index)].map(|(own, other)| {
        let role = Role::Unix {
            peer: 100 + other as u64,
            ended: 0,
        };
        state(own, libc::AF_UNIX, libc::SOCK_STREAM, 0, role)
    })
}

fn tcp_pair(index: usize) -> [State; 2] {
    [(index, index + 1), (index + 1, index)].map(|(own, other)| {
        let role = Role::Tcp(Connection {
            state: state::ESTABLISHED,
            read: 0,
            written: 0,
            unread: 0,
            unsent: 0,
            not_sent: 0,
            reading_ended: false,
            peer_gone: false,
        });
        State {
            local: loopback(2000 + own as u16),
            peer: loopback(2000 + other as u16),
            ..state(
                own,
                libc::AF_INET,
                libc::SOCK_STREAM,
                libc::IPPROTO_TCP,
                role,
            )
        }
    })
}

fn outside(index: usize) -> State {
    State {
        peer: loopback(80),
        ..tcp_pair(index)[0].clone()
    }
}

fn listener(index: usize) -> State {
    let role = Role::Listening {
        backlog: 5,
        waiting: Vec::new(),
    };
    State {
        local: loopback(3000 + index as u16),
        ..state(
            index,
            libc::AF_INET,
            libc::SOCK_STREAM,
            libc::IPPROTO_TCP,
            role,
        )
    }
}

fn datagram(index: usize) -> State {
    State {
        local: loopback(4000 + index as u16),
        ..state(
            index,
            libc::AF_INET,
            libc::SOCK_DGRAM,
            libc::IPPROTO_UDP,
            Role::Plain { ended: 0 },
        )
    }
}

/// Sockets of all sorts, by number of sort.
fn sockets(sorts: &[u8]) -> BTreeMap<ObjectId, State> {
    let mut all = Vec::new();
    for sort in sorts {
        let index = all.len();
        match sort {
            0 => all.extend(unix_pair(index)),
            1 => all.extend(tcp_pair(index)),
            2 => all.push(outside(index)),
            3 => all.push(listener(index)),
            _ => all.push(datagram(index)),
        }
    }
    all.into_iter()
        .enumerate()
        .map(|(index, state)| (id(index), state))
        .collect()
}

fn borrow(states: &BTreeMap<ObjectId, State>) -> BTreeMap<ObjectId, &State> {
    states.iter().map(|(&id, state)| (id, state)).collect()
}

/// What may have happened to a socket.
fn wreck(state: &mut State, how: u8) {
    match (how, &mut state.role) {
        (1, Role::Unix { peer, ended }) => (*peer, *ended) = (0, 3),
        (1, Role::Tcp(connection)) => connection.state = state::CLOSE_WAIT,
        (2, Role::Tcp(connection)) => (connection.read, connection.unread) = (7, 3),
        (3, Role::Listening { waiting, .. }) => waiting.push(5),
        (4, _) => state.cookie += 1,
        (5, _) => state.queue.push(Message {
            data: vec![1],
            ..Message::default()
        }),
        (6, _) => state.role = Role::Plain { ended: 0 },
        _ => {}
    }
}

proptest! {
    #[test]
    fn what_did_not_change_needs_nothing(sorts in proptest::collection::vec(0u8..5, 0..20)) {
        let recorded = sockets(&sorts);
        prop_assert_eq!(plan(&borrow(&recorded), &borrow(&recorded)), Ok(Plan::default()));
    }

    #[test]
    fn all_that_is_gone_is_made_and_both_ends_together(
        sorts in proptest::collection::vec(0u8..5, 1..20),
        fates in proptest::collection::vec(0u8..8, 40),
    ) {
        let recorded = sockets(&sorts);
        let mut now = recorded.clone();
        for ((id, state), fate) in recorded.iter().zip(&fates) {
            if *fate == 7 {
                now.remove(id);
            } else {
                let mut state = state.clone();
                wreck(&mut state, *fate);
                now.insert(*id, state);
            }
        }
        let recorded = borrow(&recorded);
        let Ok(planned) = plan(&recorded, &borrow(&now)) else { return Ok(()) };
        let ends = Ends::new(&recorded);
        for (id, record) in &recorded {
            let there = now.get(id).is_some_and(|now| now.cookie == record.cookie);
            prop_assert!(there || planned.replaced.contains(id));
            if let Some(other) = ends.of(record) {
                prop_assert_eq!(planned.replaced.contains(id), planned.replaced.contains(&other));
            }
        }
        for (id, recipe) in &planned.make {
            prop_assert!(planned.replaced.contains(id));
            if let Recipe::Pair(other) = recipe {
                prop_assert!(planned.replaced.contains(other) && !planned.make.contains_key(other));
            }
        }
        let made: usize = planned
            .make
            .values()
            .map(|recipe| if matches!(recipe, Recipe::Pair(_) | Recipe::Through(..)) { 2 } else { 1 })
            .sum();
        prop_assert_eq!(made, planned.replaced.len());
        for change in planned.changes.values() {
            prop_assert!(change.steps.is_sorted_by_key(Step::order));
        }
    }
}

#[test]
fn a_client_inside_that_waited_and_was_accepted_is_a_refusal() {
    let mut waiting = listener(0);
    waiting.role = Role::Listening {
        backlog: 5,
        waiting: vec![77],
    };
    let client = State {
        peer: waiting.local.clone(),
        ..outside(1)
    };
    let recorded = BTreeMap::from([(id(0), waiting), (id(1), client)]);
    assert_eq!(
        plan(&borrow(&recorded), &borrow(&recorded)),
        Ok(Plan::default())
    );
    let mut now = recorded.clone();
    now.insert(id(0), listener(0));
    let obstacle = plan(&borrow(&recorded), &borrow(&now)).expect_err("refused");
    assert!(
        obstacle.remedy.contains("accepted since"),
        "{}",
        obstacle.remedy
    );
}

#[test]
fn a_connection_that_was_reset_is_left_alone_ever_after() {
    let recorded = BTreeMap::from([(id(0), outside(0))]);
    let mut now = recorded.clone();
    now.get_mut(&id(0)).expect("there").role = Role::Plain { ended: 0 };
    let planned = plan(&borrow(&recorded), &borrow(&now)).expect("plan");
    assert_eq!(planned.changes[&id(0)].steps, [Step::Abort]);
    let mut adopted = recorded;
    let mut states = adopted.iter_mut().map(|(&id, state)| (id, state)).collect();
    planned.adopt(&mut states, &BTreeMap::new());
    assert_eq!(plan(&borrow(&adopted), &borrow(&now)), Ok(Plan::default()));
}
