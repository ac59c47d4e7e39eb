//! The `snapback` command. Everything it does is in [`snapback::cli`].

fn main() -> std::process::ExitCode {
    snapback::cli::main(std::env::args_os())
}
