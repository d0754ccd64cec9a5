//! `t2m token`: a token of the local development key, so that the real path can be walked without
//! Clerk.

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use serde_json::json;

use super::assemble::development_key;
use super::{BadConfiguration, owner, say};
use crate::clock::Clock;
use crate::config::{DEVELOPMENT_ISSUER, Environment};
use crate::domain::ids::UserId;

#[derive(Args)]
pub struct Token {
    /// Whose token
    #[arg(long, value_name = "ID")]
    user: String,
    /// The `role` claim
    #[arg(long)]
    role: Option<String>,
    /// The `subscription_tier` claim
    #[arg(long)]
    tier: Option<String>,
    /// How long it is valid: seconds, or a time such as `1h` or `7days`
    #[arg(long, value_name = "S", default_value = "3600", value_parser = lifetime)]
    expires_in: Duration,
    /// Where the key lies, the same as the server's
    #[arg(long, env = "T2M_DATA_DIR", default_value = "./data")]
    data_dir: PathBuf,
    /// The `aud` claim
    #[arg(long, env = "CLERK_AUDIENCE", default_value = "t2m-api")]
    clerk_audience: String,
    #[arg(long, env = "ENVIRONMENT", default_value = "development", hide = true)]
    environment: Environment,
}

impl Token {
    pub fn run(self) -> anyhow::Result<()> {
        if self.environment == Environment::Production {
            let fault = "ENVIRONMENT: production has no development key to sign with".to_owned();
            return Err(BadConfiguration(vec![fault]).into());
        }
        // The key is made at its first need.
        owner::refuse_root(&self.data_dir)?;
        let user_id = UserId::try_from(self.user)?;
        let now = Clock::system().now().timestamp();
        let lifetime_s = i64::try_from(self.expires_in.as_secs())?;
        let mut claims = json!({
            "iss": DEVELOPMENT_ISSUER,
            "aud": self.clerk_audience,
            "sub": user_id,
            "iat": now,
            "nbf": now,
            "exp": now.saturating_add(lifetime_s),
        });
        for (name, value) in [("role", self.role), ("subscription_tier", self.tier)] {
            if let Some(value) = value {
                claims[name] = value.into();
            }
        }
        say(format_args!("{}", development_key(&self.data_dir)?.sign(&claims)?));
        Ok(())
    }
}

/// A bare number counts seconds (CONTRACT §1).
fn lifetime(text: &str) -> Result<Duration, humantime::DurationError> {
    match text.parse() {
        Ok(seconds) => Ok(Duration::from_secs(seconds)),
        Err(_) => humantime::parse_duration(text),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lifetime_is_seconds_unless_it_says_otherwise() {
        assert_eq!(lifetime("90"), Ok(Duration::from_secs(90)));
        assert_eq!(lifetime("2h"), Ok(Duration::from_secs(7200)));
        for bad in ["", "-1", "1.5", "soon", "99999999999999999999"] {
            assert!(lifetime(bad).is_err(), "{bad}");
        }
    }
}
