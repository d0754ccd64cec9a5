//! The operator's command line: one file a command.

// It panics when its reader is gone, after the work was done: `say` does not.
#![deny(clippy::print_stdout)]

mod agreed;
mod arguments;
mod assemble;
mod backup;
mod clerk;
mod demo;
mod descriptors;
mod doctor;
mod door;
mod dotenv;
mod draft;
mod erase;
mod interrupt;
mod keys;
mod layout;
mod log;
mod openapi;
mod output;
mod owner;
mod point;
mod read_model;
mod replay;
mod restore;
mod serve;
mod server_lock;
mod state;
mod telemetry;
mod token;
mod webhooks;
mod worker;

use clap::{Parser, Subcommand};

use self::output::say;
use crate::config::Options;

/// The event-sourced back end of text-to-media apps on Clerk.
#[derive(Parser)]
#[command(name = "t2m", version, about, args_conflicts_with_subcommands = true)]
pub struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    options: Box<Options>,
}

#[derive(Subcommand)]
enum Command {
    /// Run the server (the default)
    Serve(Box<Options>),
    /// Bring one prompt through the whole system, with throw-away keys, and prove each step
    Demo(demo::Demo),
    /// Lease jobs from a server and let an engine of this machine do them
    Worker(Box<worker::Worker>),
    /// Read and verify the log, and carry it to another place or engine
    #[command(subcommand)]
    Log(log::Log),
    /// Rebuild the read model from the log, in the place of the one in use or into a file of its own
    Replay(replay::Replay),
    /// Show one entity, now or as it was, and the events that made it so
    State(state::State),
    /// Copy log, keys and files of a server that may be running
    Backup(backup::Backup),
    /// Put a backup into an empty data directory, once all of it is verified
    Restore(restore::Restore),
    /// Check log, read model, keys, files, disk and clock; changes nothing
    Doctor(Box<doctor::Doctor>),
    /// Destroy a user's key, and with it everything personal in the log
    Erase(erase::Erase),
    /// See to the master key
    #[command(subcommand)]
    Keys(keys::Keys),
    /// See to webhook deliveries
    #[command(subcommand)]
    Webhooks(webhooks::Webhooks),
    /// Bring users' metadata to Clerk, and Clerk's users here
    #[command(subcommand)]
    Clerk(clerk::Clerk),
    /// Mint a token with the local development key
    Token(token::Token),
    /// Print the OpenAPI document
    Openapi,
}

/// Bad configuration: a line a fault, exit code 2, nothing started.
#[derive(Debug)]
pub struct BadConfiguration(pub Vec<String>);

impl std::fmt::Display for BadConfiguration {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0.join("\n"))
    }
}

impl std::error::Error for BadConfiguration {}

impl Cli {
    fn into_command(self) -> Command {
        self.command.unwrap_or(Command::Serve(self.options))
    }
}

/// Runs the command that was given.
///
/// # Errors
/// Whatever the command could not do; [`BadConfiguration`] before anything was started.
pub fn run() -> anyhow::Result<()> {
    // Before clap reads the environment.
    dotenv::load()?;
    let command = arguments::parse()?.into_command();
    if !matches!(command, Command::Demo(_)) {
        // What is written holds personal data: for this user alone.
        rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o077));
    }
    if !matches!(command, Command::Serve(_) | Command::Worker(_)) {
        telemetry::warn_alone();
    }
    let done = match command {
        // It did what it is there for, whatever became of the line with the address.
        Command::Serve(options) => return serve::run(*options),
        Command::Demo(demo) => demo.run(),
        Command::Worker(worker) => worker.run(),
        Command::Log(log) => log.run(),
        Command::Replay(replay) => replay.run(),
        Command::State(state) => state.run(),
        Command::Backup(backup) => backup.run(),
        Command::Restore(restore) => restore.run(),
        Command::Doctor(doctor) => doctor.run(),
        Command::Erase(erase) => erase.run(),
        Command::Keys(keys) => keys.run(),
        Command::Webhooks(webhooks) => webhooks.run(),
        Command::Clerk(clerk) => clerk.run(),
        Command::Token(token) => token.run(),
        Command::Openapi => openapi::run(),
    };
    output::settle(done)
}
