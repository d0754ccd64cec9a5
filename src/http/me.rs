//! The caller's own picture of itself, and how far its onboarding is.

use std::collections::{BTreeMap, BTreeSet};

use actix_web::{HttpResponse, web};
use chrono::{DateTime, Utc};
use serde::Serialize;
use serde_json::{Map, Value};

use super::analytics::{self, MonthCounts};
use super::answer;
use super::app::App;
use super::caller::Caller;
use super::identity;
use super::jobs::at_position;
use super::json::{Fields, FromFields, Json};
use super::problem::{Code, Problem};
use crate::clerk::jwt::OrganizationClaim;
use crate::clerk::translate::{flags, onboarding};
use crate::domain::ids::{SessionId, UserId};
use crate::domain::user::{Command, Membership, Onboarding, OnboardingStatus};
use crate::views::{SessionRow, View};

/// `GET me`
pub async fn me(app: web::Data<App>, caller: Caller) -> Result<HttpResponse, Problem> {
    let views = &app.system.views;
    let user = views.user(&caller.user_id)?.ok_or_else(|| Problem::new(Code::NotFound))?;
    let usage = views.usage(&caller.user_id, app.system.clock.now())?;
    let session = match &caller.session_id {
        Some(id) => views.session(id)?,
        None => None,
    };
    let onboarding = OnboardingAnswer::of(caller.onboarding(user.onboarding).as_ref());
    let (user_type, feature_flags) = match views.user_standing(&caller.user_id) {
        Some(standing) => identity::attributes(&standing, caller.token.as_deref()),
        None => (user.user_type, user.feature_flags),
    };
    Ok(answer::ok(MeAnswer {
        user: Myself {
            id: user.user_id.to_string(),
            email: user.email,
            first_name: user.first_name,
            last_name: user.last_name,
            username: user.username,
            image_url: user.image_url,
            created_at: user.created_at,
        },
        session,
        role: caller.role,
        permissions: caller.permissions,
        subscription_tier: caller.subscription_tier,
        user_type,
        organizations: user.organizations,
        feature_flags,
        onboarding,
        usage: UsageAnswer {
            jobs: usage.jobs,
            files: usage.files,
            bytes_stored: usage.bytes_stored,
            seconds_rendered: usage.seconds_rendered,
            months: analytics::months(usage.months),
        },
    }))
}

/// The answer of `GET me`.
#[derive(Debug, Serialize, utoipa::ToSchema)]
pub struct MeAnswer {
    pub user: Myself,
    /// Null in development mode, where nobody signs in.
    pub session: Option<SessionRow>,
    pub role: String,
    pub permissions: BTreeSet<String>,
    /// `standard`, `premium` or `enterprise`.
    pub subscription_tier: String,
    pub user_type: Option<String>,
    pub organizations: Vec<Membership>,
    pub feature_flags: BTreeMap<String, bool>,
    pub onboarding: OnboardingAnswer,
    pub usage: UsageAnswer,
}

/// Who the caller is.
#[derive(Debug, Serialize, utoipa::ToSchema)]
pub struct Myself {
    pub id: String,
    pub email: Option<String>,
    pub first_name: Option<String>,
    pub last_name: Option<String>,
    pub username: Option<String>,
    pub image_url: Option<String>,
    pub created_at: DateTime<Utc>,
}

/// How far an onboarding is.
#[derive(Debug, Serialize, utoipa::ToSchema)]
pub struct OnboardingAnswer {
    /// Null if nothing is known of it.
    pub status: Option<OnboardingStatus>,
    pub step: u32,
    pub total_steps: Option<u32>,
    pub needs_onboarding: bool,
    /// Where the user is to go if it needs to.
    pub redirect_path: Option<&'static str>,
}

/// How much the caller has used.
#[derive(Debug, Serialize, utoipa::ToSchema)]
pub struct UsageAnswer {
    /// How many jobs are in each state; a state without jobs is absent.
    pub jobs: BTreeMap<String, u64>,
    /// Files that are there, made or uploaded.
    pub files: u64,
    /// Their sizes together; equal bytes count for each file.
    pub bytes_stored: u64,
    /// The length of all completed videos.
    pub seconds_rendered: f64,
    /// Those of the last twelve in which anything happened, the oldest first.
    pub months: Vec<MonthCounts>,
}

impl OnboardingAnswer {
    fn of(progress: Option<&Onboarding>) -> Self {
        let needed = progress.is_none_or(|it| it.status != OnboardingStatus::Completed);
        Self {
            status: progress.map(|progress| progress.status),
            step: progress.map_or(0, |progress| progress.step),
            total_steps: progress.map(|progress| progress.total_steps),
            needs_onboarding: needed,
            redirect_path: needed.then_some("/onboarding"),
        }
    }
}

/// The body of `POST onboarding`.
#[derive(Debug, utoipa::ToSchema)]
pub struct OnboardingRequest {
    pub step: u64,
    pub total_steps: Option<u64>,
    /// `not_started`, `in_progress`, `completed` or `abandoned`; from the step if absent.
    pub status: Option<&'static str>,
}

impl FromFields for OnboardingRequest {
    fn from_fields(fields: &mut Fields) -> Self {
        fields.alias("totalSteps", "total_steps");
        Self {
            step: fields.u64("step", 0..=1000),
            total_steps: fields.optional_u64("total_steps", 1..=1000),
            status: fields.optional_choice("status", &OnboardingStatus::NAMES),
        }
    }
}

/// `POST onboarding`
pub async fn progress(
    app: web::Data<App>,
    caller: Caller,
    body: Json<OnboardingRequest>,
) -> Result<HttpResponse, Problem> {
    let known = app.system.views.user(&caller.user_id)?.and_then(|user| user.onboarding);
    let known = caller.onboarding(known);
    let number = |value: u64| u32::try_from(value).unwrap_or(u32::MAX);
    let step = number(body.0.step);
    let total_steps = match body.0.total_steps {
        Some(total) => number(total),
        None => known.map_or(Onboarding::DEFAULT_STEPS, |known| known.total_steps),
    };
    if step > total_steps {
        return Err(Problem::field("step", "must not be beyond total_steps"));
    }
    let by_step = match step {
        0 => OnboardingStatus::NotStarted,
        step if step == total_steps => OnboardingStatus::Completed,
        _ => OnboardingStatus::InProgress,
    };
    let status = body.0.status.and_then(OnboardingStatus::parse).unwrap_or(by_step);
    let command = Command::Onboard(Onboarding { step, total_steps, status });
    let done = app.system.users.execute(&caller.user_id, command, caller.origin()).await?;
    app.system.visible_in(View::Users, done.position).await?;
    let shown = OnboardingAnswer::of(done.state.onboarding.as_ref());
    Ok(at_position(answer::ok(shown), done.position))
}

/// The answer of `GET session-token`; without a session or a token in development mode.
#[derive(Debug, Serialize, utoipa::ToSchema)]
pub struct ClaimsAnswer<'a> {
    #[schema(value_type = String)]
    user_id: &'a UserId,
    #[schema(value_type = Option<String>)]
    session_id: Option<&'a SessionId>,
    role: &'a str,
    permissions: &'a BTreeSet<String>,
    subscription_tier: &'a str,
    /// This and what follows is as the token has it, whatever else is known of the user.
    email: Option<&'a str>,
    user_type: Option<&'a str>,
    #[schema(value_type = Vec<Object>)]
    organizations: &'a [OrganizationClaim],
    feature_flags: BTreeMap<String, bool>,
    onboarding: Option<Onboarding>,
    /// The plan and the features of Clerk's billing, without their scopes.
    plan: Option<&'a str>,
    features: &'a [String],
    /// Unix seconds.
    issued_at: Option<i64>,
    /// Unix seconds.
    expires_at: Option<i64>,
    #[schema(value_type = Option<Object>)]
    claims: Option<&'a Map<String, Value>>,
}

/// `GET session-token`: the claims as they were understood, for debugging; not in production.
pub async fn claims(app: web::Data<App>, caller: Caller) -> Result<HttpResponse, Problem> {
    if app.production {
        return Err(Problem::new(Code::NotFound));
    }
    let token = caller.token.as_deref();
    Ok(answer::ok(ClaimsAnswer {
        user_id: &caller.user_id,
        session_id: caller.session_id.as_ref(),
        role: &caller.role,
        permissions: &caller.permissions,
        subscription_tier: &caller.subscription_tier,
        email: token.and_then(|token| token.email.as_deref()),
        user_type: token.and_then(|token| token.user_type.as_deref()),
        organizations: token.map_or(&[], |token| &token.organizations),
        feature_flags: token.map(|token| flags(&token.feature_flags)).unwrap_or_default(),
        onboarding: token.and_then(onboarding),
        plan: token.and_then(|token| token.plan.as_deref()),
        features: token.map_or(&[], |token| &token.features),
        issued_at: token.map(|token| token.issued_at),
        expires_at: token.map(|token| token.expires_at),
        claims: token.map(|token| &token.raw),
    }))
}
