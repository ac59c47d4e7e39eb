//! What the tests share: fixture programs, the `snapback` command, guards that leave nothing behind, numbers of
//! `/proc`, and waiting on conditions.

pub(crate) mod container;
pub(crate) mod family;
pub(crate) mod fixture;
pub(crate) mod manifest;
pub(crate) mod nginx;
pub(crate) mod numbers;
pub(crate) mod redis;
pub(crate) mod session;
pub(crate) mod wait;

/// Ends the test as skipped, visibly; under `SNAPBACK_STRICT=1` a skip is a failure.
macro_rules! skip {
    ($($reason:tt)*) => {{
        let reason = format!($($reason)*);
        println!("SKIP {reason}");
        assert!(std::env::var_os("SNAPBACK_STRICT").is_none_or(|strict| strict != "1"), "SKIP {reason}");
        return;
    }};
}

/// For every fixture program named: that it notices being wrecked, and that it comes back from that twice, also to
/// checkpoints that are increments of others.
macro_rules! fixture_tests {
    ($($program:ident),* $(,)?) => {$(
        mod $program {
            #[test]
            fn notices_what_is_wrecked() {
                crate::support::fixture::control_run(stringify!($program));
            }

            #[test]
            fn comes_back() {
                crate::support::fixture::rollback_run(stringify!($program));
            }

            #[test]
            fn comes_back_by_increments() {
                crate::support::fixture::increment_run(stringify!($program));
            }
        }
    )*};
}

pub(crate) use fixture_tests;
pub(crate) use skip;
