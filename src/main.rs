//! `t2m`: parse, run, exit code.

use std::process::ExitCode;

use clap::Parser;
use t2m::cli::{BadConfiguration, Cli, run};

fn main() -> ExitCode {
    // Before clap reads the environment; a missing file is no fault, a broken one is.
    match dotenvy::dotenv() {
        Ok(_) => {}
        Err(error) if error.not_found() => {}
        Err(error) => {
            eprintln!(".env: {error}");
            return ExitCode::from(2);
        }
    }
    let Err(error) = run(Cli::parse()) else { return ExitCode::SUCCESS };
    if error.is::<BadConfiguration>() {
        eprintln!("{error}");
        return ExitCode::from(2);
    }
    eprintln!("t2m: {error:#}");
    ExitCode::FAILURE
}
