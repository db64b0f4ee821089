{{- define "inflightd.name" -}}
{{- default .Release.Name .Values.nameOverride | trunc 50 | trimSuffix "-" -}}
{{- end -}}

{{- define "inflightd.selector" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "inflightd.labels" -}}
{{ include "inflightd.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end -}}

{{- define "inflightd.serviceAccount" -}}
{{- if .Values.serviceAccount.create -}}
{{- default (include "inflightd.name" .) .Values.serviceAccount.name -}}
{{- else -}}
{{- default "default" .Values.serviceAccount.name -}}
{{- end -}}
{{- end -}}

{{- define "inflightd.waiting" -}}
{{ .Values.metricsPrefix }}:num_requests_waiting
{{- end -}}

{{- /* Every path but /health/live wants a key where keys are set, and manifests should hold none. */ -}}
{{- define "inflightd.readyProbe" -}}
{{- if .Values.apiKeys.existingSecret -}}
exec:
  command:
    - python
    - -c
    - |
      import urllib.request as r
      key = open("/etc/inflightd/probe-key").read().strip()
      r.urlopen(r.Request("http://127.0.0.1:8000/health/ready", headers={"x-api-key": key}), timeout=4)
{{- else -}}
httpGet: {path: /health/ready, port: http}
{{- end }}
timeoutSeconds: 5
{{- end -}}

{{- /* A value as the server reads it. Whole numbers of values.yaml are floats, which Go writes as 1e+06. */ -}}
{{- define "inflightd.flag" -}}
{{- if kindIs "bool" . }}{{ ternary "on" "off" . }}{{ else if kindIs "string" . }}{{ . }}{{ else }}{{ toJson . }}{{ end -}}
{{- end -}}
