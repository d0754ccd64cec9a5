//! The command line and the environment. Of a variable that has no usable value clap says what it says
//! of a flag, in several lines and of the first alone; here it is a line each, of all of them.

use std::error::Error as _;
use std::ffi::OsString;

use clap::error::{ContextKind, ContextValue, Error, ErrorKind};
use clap::{Arg, Command, CommandFactory, FromArgMatches};

use super::{BadConfiguration, Cli, assemble};

/// What was asked for; help, and what is wrong with the flags themselves, end the program.
///
/// # Errors
/// [`BadConfiguration`] with a line for each variable.
pub fn parse() -> Result<Cli, BadConfiguration> {
    let words: Vec<OsString> = std::env::args_os().collect();
    let mut command = Cli::command();
    let named = words.get(1).and_then(|word| command.find_subcommand(word));
    if named.is_some() {
        // The variables are that command's; clap would hold them against the server's options too.
        command = command.mut_args(|arg| arg.env(None::<&str>));
    }
    let mut faults = Vec::new();
    loop {
        let matches = command.clone().try_get_matches_from(&words);
        let error = match matches.and_then(|mut found| Cli::from_arg_matches_mut(&mut found)) {
            Ok(cli) if faults.is_empty() => return Ok(cli),
            Ok(cli) => {
                // What else is wrong with the server's settings is said with it.
                if let super::Command::Serve(options) = cli.into_command() {
                    faults.extend(assemble::check(*options).err().into_iter().flat_map(|it| it.0));
                }
                return Err(BadConfiguration(faults));
            }
            Err(error) => error,
        };
        match variable_of(&command, &words, &error) {
            Some(variable) => {
                faults.push(format!("{variable}: {}", what_is_wrong(&error)));
                command = without(command, &|name| name == variable);
            }
            None if faults.is_empty() => error.exit(),
            None => return Err(BadConfiguration(faults)),
        }
    }
}

/// A command that does not read the variables which are meant, nor do those below it.
pub fn without(command: Command, is_meant: &impl Fn(&str) -> bool) -> Command {
    let apart = |arg: Arg| match variable(&arg) {
        Some(name) if is_meant(name) => arg.env(None::<&str>),
        _ => arg,
    };
    command.mut_args(apart).mut_subcommands(|below| without(below, is_meant))
}

fn variable(arg: &Arg) -> Option<&str> {
    arg.get_env().and_then(|name| name.to_str())
}

/// The variable that a bad value came from; none if it was a flag's.
fn variable_of(command: &Command, words: &[OsString], error: &Error) -> Option<String> {
    let is_value = matches!(
        error.kind(),
        ErrorKind::InvalidValue | ErrorKind::ValueValidation | ErrorKind::InvalidUtf8
    );
    let ContextValue::String(option) = error.get(ContextKind::InvalidArg)? else { return None };
    let flag = option.split([' ', '[', '=']).next().unwrap_or_default();
    let is_given = |word: &OsString| {
        let word = word.to_string_lossy();
        word == flag || word.strip_prefix(flag).is_some_and(|rest| rest.starts_with('='))
    };
    if !is_value || words.iter().any(is_given) {
        return None;
    }
    find(command, flag.strip_prefix("--")?)
}

/// The variable of an option of this command or one below it.
fn find(command: &Command, option: &str) -> Option<String> {
    let own = command.get_arguments().filter(|arg| arg.get_long() == Some(option));
    let own = own.filter_map(variable).find(|name| std::env::var_os(name).is_some());
    let own = own.map(str::to_owned);
    own.or_else(|| command.get_subcommands().find_map(|below| find(below, option)))
}

/// In words that follow the variable's name. The value is not among them.
fn what_is_wrong(error: &Error) -> String {
    match (error.get(ContextKind::ValidValue), error.source()) {
        (Some(ContextValue::Strings(values)), _) if !values.is_empty() => {
            format!("is none of {}", values.join(", "))
        }
        (_, Some(source)) => source.to_string(),
        _ => "has no value that can be used".to_owned(),
    }
}
