//! From a request to the user who makes it: through the bearer token, the session and the read
//! model.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use actix_web::http::{Method, header};
use actix_web::{HttpMessage, HttpRequest};
use chrono::{DateTime, TimeDelta, Utc};

use super::app::App;
use super::caller::Caller;
use super::edges::RequestId;
use super::problem::{Code, Problem};
use super::routes::without_prefix;
use crate::actors::codec::{Metadata, Source};
use crate::actors::entity::Failure;
use crate::clerk::jwt::{CLOCK_SKEW_S, Rejected, Verified};
use crate::clerk::translate::{claims, flags};
use crate::domain::ids::{SessionId, UserId};
use crate::domain::session::{self, ACTIVITY_GRAIN, EndReason};
use crate::domain::text::Personal;
use crate::domain::user::{self, Claims, Profile, Right, Snapshot, Told};
use crate::views::{SessionStanding, UserAccess, View};

/// A token this close to its end is worth renewing (seed, `refreshThreshold`).
const REFRESH_WITHIN: TimeDelta = TimeDelta::minutes(5);

/// In a request's extensions: its token is worth renewing.
#[derive(Debug, Clone, Copy)]
pub struct RefreshRecommended;

/// The user who asks, provisioned and in a live session.
///
/// # Errors
/// 401 with the reason, 403 `session_pending`, 503 if neither can be told.
pub async fn identify(app: &App, request: &HttpRequest) -> Result<Caller, Problem> {
    if app.dev_mode { developer(app, request).await } else { signed_in(app, request).await }
}

fn request_id(request: &HttpRequest) -> String {
    request.extensions().get::<RequestId>().map(|it| it.id.clone()).unwrap_or_default()
}

/// Development mode: whoever the request says it is, with every right.
async fn developer(app: &App, request: &HttpRequest) -> Result<Caller, Problem> {
    let named = request.headers().get("x-dev-user").map(|value| value.to_str().unwrap_or_default());
    let user_id = UserId::try_from(named.unwrap_or("dev_user").to_owned()).map_err(|_| {
        Problem::new(Code::MalformedRequest).with_sentence("X-Dev-User is not a user id")
    })?;
    let caller = Caller {
        user_id,
        session_id: None,
        role: "admin".to_owned(),
        permissions: BTreeSet::new(),
        subscription_tier: "premium".to_owned(),
        token: None,
        request_id: request_id(request),
    };
    if app.system.views.user_standing(&caller.user_id).is_none() {
        let email = Personal::Known(format!("{}@localhost", caller.user_id));
        let snapshot = Snapshot {
            profile: Profile { email: Some(email), ..Profile::default() },
            told: Told {
                role: Some(caller.role.clone()),
                subscription_tier: Some(caller.subscription_tier.clone()),
                ..Told::default()
            },
            ..Snapshot::default()
        };
        provision(app, &caller.user_id, snapshot.into(), caller.origin()).await?;
    }
    Ok(caller)
}

async fn signed_in(app: &App, request: &HttpRequest) -> Result<Caller, Problem> {
    let now = app.system.clock.now();
    let token = app
        .authenticator
        .authenticate(bearer(request)?, now.timestamp())
        .await
        .map_err(|rejected| refusal(&rejected, now))?;
    let unusable = |_| Problem::new(Code::TokenInvalid);
    let user_id = UserId::try_from(token.user_id.clone()).map_err(unusable)?;
    let session_id = match &token.session_id {
        Some(id) => SessionId::try_from(id.clone()).map_err(unusable)?,
        None => SessionId::of_token(&user_id, token.issued_at),
    };
    let access = known_user(app, request, &user_id, &token).await?;
    live_session(app, request, &user_id, &session_id, &token).await?;
    if token.expires_at - now.timestamp() <= REFRESH_WITHIN.num_seconds() {
        request.extensions_mut().insert(RefreshRecommended);
    }
    let (role, permissions, subscription_tier) = effective(&access, &token);
    let request_id = request_id(request);
    let session_id = Some(session_id);
    Ok(Caller {
        user_id,
        session_id,
        role,
        permissions,
        subscription_tier,
        token: Some(token),
        request_id,
    })
}

/// RFC 6750, section 2.1; the scheme's case does not matter.
pub fn bearer(request: &HttpRequest) -> Result<&str, Problem> {
    let value = request.headers().get(header::AUTHORIZATION);
    let value = value.ok_or_else(|| Problem::new(Code::Unauthenticated))?;
    let text = value.to_str().map_err(|_| Problem::new(Code::TokenInvalid))?;
    match text.split_once(' ') {
        Some((scheme, token)) if scheme.eq_ignore_ascii_case("bearer") => Ok(token.trim_start()),
        _ => Err(Problem::new(Code::Unauthenticated)),
    }
}

/// One body for every token that is wrong, so that an attacker learns nothing from trying.
fn refusal(rejected: &Rejected, now: DateTime<Utc>) -> Problem {
    match rejected {
        Rejected::Expired { expired_at } => Problem::token_expired(*expired_at, now.timestamp()),
        Rejected::SessionPending => Problem::new(Code::SessionPending),
        Rejected::NoKeys => Problem::new(Code::KeysUnavailable),
        other => Problem::new(Code::TokenInvalid).caused_by(other.to_string()),
    }
}

/// Made only for the few requests that record something on their way in.
fn origin(request: &HttpRequest, user_id: &UserId) -> Metadata {
    let mut origin = Metadata::by(user_id.as_str(), Source::Api);
    origin.correlation_id = request_id(request);
    origin
}

/// The user as the read model has it, provisioned from the claims if no webhook came yet.
async fn known_user(
    app: &App,
    request: &HttpRequest,
    user_id: &UserId,
    token: &Verified,
) -> Result<Arc<UserAccess>, Problem> {
    let views = &app.system.views;
    let access = match views.user_standing(user_id) {
        Some(access) => access,
        None => {
            provision(app, user_id, claims(token), origin(request, user_id)).await?;
            views.user_standing(user_id).ok_or_else(|| Problem::new(Code::NotCaughtUp))?
        }
    };
    if access.deleted {
        return Err(session_ended(EndReason::UserDeleted));
    }
    if access.banned {
        return Err(session_ended(EndReason::UserBanned));
    }
    Ok(access)
}

async fn provision(
    app: &App,
    user_id: &UserId,
    claims: Claims,
    origin: Metadata,
) -> Result<(), Problem> {
    match app.system.users.execute(user_id, user::Command::Provision(claims), origin).await {
        Ok(done) => Ok(app.system.visible(done.position).await?),
        Err(Failure::Refused(user::Refusal::Deleted)) => Err(session_ended(EndReason::UserDeleted)),
        Err(failure) => Err(failure.into()),
    }
}

/// Refuses an ended session, begins one that is new to us, and notes activity.
async fn live_session(
    app: &App,
    request: &HttpRequest,
    user_id: &UserId,
    session_id: &SessionId,
    token: &Verified,
) -> Result<(), Problem> {
    let now = app.system.clock.now();
    // Then an end may not show, and the session itself must be asked.
    let is_parked = app.system.progress.now().parked.iter().any(|it| it.view == View::Sessions);
    let command = match app.system.views.session_standing(session_id) {
        Some(SessionStanding::Ended(reason)) => return Err(session_ended(reason)),
        Some(SessionStanding::Live { user_id: owner, .. }) if owner != *user_id => {
            return Err(Problem::new(Code::TokenInvalid).caused_by("the session is another user's"));
        }
        Some(SessionStanding::Live { expires_at, last_active_at, remembered, .. }) => {
            let live = session::Live {
                user_id: user_id.clone(),
                started_at: last_active_at,
                expires_at,
                last_active_at,
                remembered,
            };
            let lapsed = live.lapsed(now).is_some();
            let active = now - last_active_at >= ACTIVITY_GRAIN && is_activity(request);
            match (lapsed, active) {
                (true, _) => session::Command::Lapse,
                (false, true) => session::Command::Touch,
                (false, false) if is_parked => ASK,
                (false, false) => return Ok(()),
            }
        }
        None => start_of(app, request, user_id, token, now),
    };
    // To note that somebody reads is no reason to refuse the reading: while the log is away it is
    // not noted, and nobody waits for it either. A token without a session's id begins a session
    // with each new one.
    let is_needless = match &command {
        session::Command::Touch => true,
        session::Command::Start { expires_at: Some(ends), .. } => is_read(request) && now < *ends,
        _ => false,
    };
    // A row that cannot be read counts as an unknown session.
    let would_show_an_end = || !is_parked && app.system.views.session(session_id).is_ok();
    let command = match is_needless && app.system.log.writable().is_err() {
        true if would_show_an_end() => return Ok(()),
        true => ASK,
        false => command,
    };
    let asks = matches!(command, session::Command::Lapse);
    let origin = origin(request, user_id);
    let done = match app.system.sessions.execute(session_id, command, origin).await {
        Err(Failure::Unavailable(_)) if is_needless && !asks && would_show_an_end() => {
            return Ok(());
        }
        done => done?,
    };
    app.system.visible(done.position).await?;
    match done.state {
        session::Session::Live(live) if live.user_id == *user_id => match live.lapsed(now) {
            // The token is older than any session may be.
            Some(reason) => Err(session_ended(reason)),
            None => Ok(()),
        },
        session::Session::Ended(reason) => Err(session_ended(reason)),
        // Asked only; it begins when that can be noted.
        session::Session::Unknown if asks => Ok(()),
        session::Session::Live(_) | session::Session::Unknown => {
            Err(Problem::new(Code::TokenInvalid).caused_by("the session is another user's"))
        }
    }
}

/// Records nothing of a session whose time is not over.
const ASK: session::Command = session::Command::Lapse;

fn start_of(
    app: &App,
    request: &HttpRequest,
    user_id: &UserId,
    token: &Verified,
    now: DateTime<Utc>,
) -> session::Command {
    let agent = request.headers().get(header::USER_AGENT).and_then(|value| value.to_str().ok());
    // A template token may be days old when it first comes here; the session is as old as its
    // first request, and its own lifetime ends it.
    let issued_at = DateTime::from_timestamp(token.issued_at, 0).unwrap_or(now);
    session::Command::Start {
        user_id: user_id.clone(),
        started_at: now,
        expires_at: Some(issued_at + session::LIFETIME),
        ip_address: app.proxies.client(request).map(|address| address.to_string()),
        user_agent: agent.map(|agent| agent.chars().take(256).collect()),
    }
}

fn is_read(request: &HttpRequest) -> bool {
    matches!(*request.method(), Method::GET | Method::HEAD)
}

/// What a waiting page does by itself is not activity (CONTRACT §4).
fn is_activity(request: &HttpRequest) -> bool {
    let path = without_prefix(request.path()).unwrap_or_default();
    let waiting = path == "/events" || path.starts_with("/jobs/") || path.starts_with("/status/");
    !(request.method() == Method::GET && waiting)
}

fn session_ended(reason: EndReason) -> Problem {
    Problem::session_ended(reason)
}

/// The read model overrules a token that is older than its last change; a newer token has heard
/// of a change whose webhook is still on its way.
fn is_newer(token: &Verified, access: &UserAccess) -> bool {
    // Its time is whole seconds. The issuer's clock may run ahead of ours, but not of its own.
    let after = |at: DateTime<Utc>, skew| token.issued_at > at.timestamp() + skew;
    access.access_changed_at.is_none_or(|at| after(at, CLOCK_SKEW_S))
        && access.told_at.is_none_or(|at| after(at, 0))
}

/// The rights, of a token that is newer as it claims them. What was decided here no token overrules:
/// Clerk may not have heard of it.
fn effective(access: &UserAccess, token: &Verified) -> (String, BTreeSet<String>, String) {
    let newer = is_newer(token, access);
    let open = |right| newer && !access.decided_here.rights.contains(&right);
    let role = token.role.clone().filter(|_| open(Right::Role));
    let role = role.unwrap_or_else(|| access.role.clone());
    let tier = token.tier.clone().filter(|_| open(Right::SubscriptionTier));
    let tier = tier.unwrap_or_else(|| access.subscription_tier.clone());
    let permissions = if open(Right::Permissions) && !token.permissions.is_empty() {
        token.permissions.iter().cloned().collect()
    } else {
        access.permissions.iter().cloned().collect()
    };
    (role, permissions, tier)
}

/// User type and feature flags in the same way.
pub fn attributes(
    access: &UserAccess,
    token: Option<&Verified>,
) -> (Option<String>, BTreeMap<String, bool>) {
    let newer = token.filter(|token| is_newer(token, access));
    let user_type = newer.filter(|_| !access.decided_here.user_type);
    let user_type = user_type.and_then(|token| token.user_type.clone());
    let claimed = newer.filter(|_| !access.decided_here.flags);
    let claimed = claimed.map(|token| flags(&token.feature_flags)).filter(|it| !it.is_empty());
    (
        user_type.or_else(|| access.user_type.clone()),
        claimed.unwrap_or_else(|| access.feature_flags.clone()),
    )
}

#[cfg(test)]
mod tests {
    use actix_web::test::TestRequest;

    use super::*;

    #[test]
    fn what_a_waiting_page_does_by_itself_is_no_activity() {
        let table = [
            ("GET", "/api/v1/events", false),
            ("GET", "/api/jobs/1", false),
            ("GET", "/api/v1/jobs/1/events", false),
            ("GET", "/api/status/1", false),
            ("GET", "/api/v1/jobs", true),
            ("GET", "/api/v1/me", true),
            ("GET", "/api/v1/admin/events", true),
            ("GET", "/api/admin/events", true),
            ("POST", "/api/v1/jobs/1/cancel", true),
        ];
        for (method, path, is) in table {
            let method = Method::from_bytes(method.as_bytes()).unwrap();
            let request = TestRequest::with_uri(path).method(method).to_http_request();
            assert_eq!(is_activity(&request), is, "{path}");
        }
    }
}
