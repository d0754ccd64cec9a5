//! `t2m`: parse, run, exit code.

use std::process::ExitCode;

use t2m::cli::{BadConfiguration, run};

fn main() -> ExitCode {
    let Err(error) = run() else { return ExitCode::SUCCESS };
    // Whatever it was met in.
    if let Some(faults) = error.downcast_ref::<BadConfiguration>() {
        eprintln!("{faults}");
        return ExitCode::from(2);
    }
    eprintln!("t2m: {error:#}");
    ExitCode::FAILURE
}
