//! Which engine makes what, and what a program may use.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;

/// What makes the results of a kind of job.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Engine {
    /// The built-in renderer.
    Storyboard,
    /// A program and its arguments, its path absolute.
    Command(Vec<String>),
    /// Remote workers alone.
    None,
}

impl Engine {
    /// Reads `storyboard`, `none` or `command:PROGRAM ARGS…`. The words are split as a shell would,
    /// quotes included, and no shell reads them.
    ///
    /// # Errors
    /// What is wrong, in words that follow the setting's name.
    pub fn parse(text: &str) -> Result<Self, String> {
        let Some(line) = text.strip_prefix("command:") else {
            return match text {
                "storyboard" => Ok(Self::Storyboard),
                "none" => Ok(Self::None),
                _ => Err("is `storyboard`, `command:PROGRAM ARGS…` or `none`".to_owned()),
            };
        };
        let mut words = shell_words::split(line).map_err(|_| "has a quote without its end")?;
        let program = words.first_mut().ok_or("names no program")?;
        *program = find(program)
            .ok_or_else(|| format!("`{program}` is not there, or not a program"))?
            .to_string_lossy()
            .into_owned();
        Ok(Self::Command(words))
    }
}

/// The absolute path of a program: where it says, or along `PATH`.
fn find(program: &str) -> Option<PathBuf> {
    let is_program = |path: &Path| {
        let meta = std::fs::metadata(path);
        meta.is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
    };
    if program.contains('/') {
        return std::path::absolute(program).ok().filter(|path| is_program(path));
    }
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|folder| folder.join(program)).find(|path| is_program(path))
}

/// What a program may use.
#[derive(Debug, Clone, Args)]
pub struct LimitOptions {
    /// How long a program may work on one job, e.g. 30m; under an hour
    #[arg(long, env = "T2M_ENGINE_TIME_LIMIT", default_value = "30m")]
    engine_time_limit: humantime::Duration,
    /// Address space of each process of a program, in bytes; 0 is no limit
    #[arg(long, env = "T2M_ENGINE_MEMORY_LIMIT", default_value_t = 4 * 1024 * 1024 * 1024)]
    engine_memory_limit: u64,
    /// The largest file that a program may write, in bytes
    #[arg(long, env = "T2M_ENGINE_OUTPUT_LIMIT", default_value_t = 2 * 1024 * 1024 * 1024)]
    engine_output_limit: u64,
    /// What a job may fill of the disk while it is worked on, in bytes [default: four times
    /// T2M_ENGINE_OUTPUT_LIMIT]
    #[arg(long, env = "T2M_ENGINE_SCRATCH_LIMIT")]
    engine_scratch_limit: Option<u64>,
}

/// Beyond it an attempt is over, whatever its program does (`domain::job::LONGEST_ATTEMPT`).
pub(super) const LONGEST_TIME: Duration = Duration::from_secs(60 * 60);
/// Room for the result, what it is made of, and what is half done.
const SCRATCH_OUTPUTS: u64 = 4;

/// Checked [`LimitOptions`].
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct EngineLimits {
    pub time: Duration,
    /// In bytes; 0 is no limit.
    pub memory_bytes: u64,
    pub output_bytes: u64,
    /// Of all files of a job.
    pub scratch_bytes: u64,
}

impl LimitOptions {
    /// # Errors
    /// A line for each limit that would let nothing run.
    pub fn check(&self) -> Result<EngineLimits, Vec<String>> {
        let mut faults = Vec::new();
        if self.engine_time_limit.is_zero() {
            faults.push("T2M_ENGINE_TIME_LIMIT: must be longer than nothing".to_owned());
        }
        if *self.engine_time_limit >= LONGEST_TIME {
            faults.push("T2M_ENGINE_TIME_LIMIT: must be under 60m".to_owned());
        }
        if (1..1024 * 1024).contains(&self.engine_memory_limit) {
            faults.push("T2M_ENGINE_MEMORY_LIMIT: must be at least 1 MiB, or 0".to_owned());
        }
        if self.engine_output_limit < 1024 {
            faults.push("T2M_ENGINE_OUTPUT_LIMIT: must be at least 1 KiB".to_owned());
        }
        let outputs = self.engine_output_limit.saturating_mul(SCRATCH_OUTPUTS);
        let scratch_bytes = self.engine_scratch_limit.unwrap_or(outputs);
        if scratch_bytes < self.engine_output_limit {
            faults.push(
                "T2M_ENGINE_SCRATCH_LIMIT: must be at least T2M_ENGINE_OUTPUT_LIMIT".to_owned(),
            );
        }
        if !faults.is_empty() {
            return Err(faults);
        }
        Ok(EngineLimits {
            time: *self.engine_time_limit,
            memory_bytes: self.engine_memory_limit,
            output_bytes: self.engine_output_limit,
            scratch_bytes,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_split_and_the_program_is_found() {
        let parsed = Engine::parse("command:sh -c 'a  b' \"$HOME;`x`\"");
        let Ok(Engine::Command(words)) = parsed else { panic!("{parsed:?}") };
        assert!(words[0].starts_with('/') && words[0].ends_with("/sh"), "{words:?}");
        assert_eq!(words[1..], ["-c", "a  b", "$HOME;`x`"], "and nothing is interpreted");
        assert_eq!(Engine::parse("storyboard"), Ok(Engine::Storyboard));
        assert_eq!(Engine::parse("none"), Ok(Engine::None));
    }

    #[test]
    fn what_cannot_be_run_is_refused() {
        for bad in
            ["", "storybord", "command:", "command: ", "command:sh 'a", "command:/etc/passwd"]
        {
            assert!(Engine::parse(bad).is_err(), "{bad}");
        }
        let fault = Engine::parse("command:no-such-program-anywhere --x").unwrap_err();
        assert!(fault.contains("no-such-program-anywhere"), "{fault}");
    }
}
